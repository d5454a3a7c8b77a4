"""Chat templates are programs of a stranger: here they run with a bound on their turns, their time and what they make.

transformers renders them in jinja's sandbox, which keeps them from files and modules, but not from looping for ever or from a text of
ten billion letters. Its environment is exchanged for one that counts. What is counted: every turn of a loop, call and filter; the size of
whatever is stored, handed over, or written; and, before it is made, what an operation on sizes would make (``*``, widths, ``replace``).
Between two of these a template can grow a text only by as many pieces as stand in one expression. The clock is looked at inside of loops
and by every operation on a large value, wherever it stands, since one of them may take milliseconds. Honest templates stay orders of
magnitude below every bound, so what they write is the same, to the letter.
"""

from teacher_cache.preparing.bounded_templates.counting import TooMuch
from teacher_cache.preparing.bounded_templates.environment import BoundedEnvironment, bounded, install

__all__ = ["BoundedEnvironment", "TooMuch", "bounded", "install"]
