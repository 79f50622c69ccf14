"""The one exception that stands for a mistake of the user's, not of the program's."""


class UserError(Exception):
    """Bad input or configuration, told in one sentence: which file, what is wrong, what to do.

    `demo2eval.cli.run` prints the sentence without a traceback and exits with status 1.
    """
