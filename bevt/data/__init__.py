"""What files there are (`manifest`), what is asked of them (`sampling`), how it is read (`pyav`), served (`build`)."""

from bevt.config import UserError


class DataError(UserError):
    """Files that cannot be used as they are; the message names them and says what to do."""
