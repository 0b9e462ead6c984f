"""Settings of the local launcher itself."""

from pydantic import PositiveFloat, PositiveInt

from runtime.settings import Settings


class LauncherSettings(Settings):
    max_restarts: PositiveInt = 5
    """Restarts of one worker within restart_window_s; one more stops the whole system."""

    restart_window_s: PositiveFloat = 60.0
    """Seconds over which restarts are counted."""

    start_timeout_s: PositiveFloat = 600.0
    """Seconds that the system may take until it is ready."""
