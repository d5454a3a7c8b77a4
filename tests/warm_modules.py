"""What a capture, a training or a student of a grid imports: brought in once by a process that others are forked from."""

import transformers.models.auto.modeling_auto
import transformers.models.llava.modeling_llava
import transformers.models.qwen2.modeling_qwen2
import transformers.models.siglip.modeling_siglip  # noqa: F401

import cli  # noqa: F401
import pipelines.ablate.cell
import pipelines.capture.cache_teacher
import pipelines.capture.worker
import pipelines.judge.evaluation.run
import pipelines.train.train_student  # noqa: F401
from student_train.methods import method_modules
from teacher_cache.fields import field_kinds

method_modules(), field_kinds()
