"""How the demo's tokenizer, teacher and student start were trained: what ``pipelines/demo/assets`` holds.

python -m benchmarks.demo_training.tokenizer
python -m benchmarks.demo_training.train_teacher --out FOLDER
python -m benchmarks.demo_training.score_teacher
python -m benchmarks.demo_training.train_student_start
"""

from pathlib import Path

import pipelines.demo

ASSETS = Path(pipelines.demo.__file__).parent / "assets"
