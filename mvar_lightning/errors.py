"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: the message names the thing, the value and the way out.

    The command line prints it as one line without a traceback; everything else that escapes is a bug of ours.
    """
