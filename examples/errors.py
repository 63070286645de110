"""The one error a user of the examples should ever see."""


class UserError(Exception):
    """A problem that the user can fix: a wrong key, a missing file, a truncated shard, a full disk.

    The message is one line that names the thing, the rule and the value. `examples.run` prints it
    without a traceback and exits with status 2; nothing on disk is left half written.
    """
