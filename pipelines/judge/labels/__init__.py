"""Labels that the teacher contradicts: which answers of a mixture are probably wrong, and how many, from a cache alone.

``answers`` scores one answer, ``tally`` counts a source and estimates, ``reading`` reads rows, ``survey`` goes through a cache, ``show``
prints, ``weights`` writes what ``--select`` reads, ``advice`` says what to expect of distillation.
"""
