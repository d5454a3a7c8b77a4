"""placeholder"""


def print_tables() -> None: ...
