"""The one exception for input that a person can mend."""


class InputError(Exception):
    """Something that the user gave is wrong: what, where, and what would be right, in one line.

    The command line prints it and exits with code 2, before anything is written. Library callers catch it like
    any exception; it never hides a fault of our own.
    """
