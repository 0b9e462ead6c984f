"""Settings of the launcher itself, and of Ray where it places the workers."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from runtime.settings import Settings


class LauncherSettings(Settings):
    on: Literal["local", "ray"] = "local"
    """Where `headrace up` runs the workers. local: this machine; ray: nodes of a Ray cluster."""

    max_restarts: PositiveInt = 5
    """Restarts of one worker within restart_window_s; one more stops the whole system."""

    restart_window_s: PositiveFloat = 60.0
    """Seconds over which restarts are counted."""

    start_timeout_s: PositiveFloat = 600.0
    """Seconds that the system may take until it is ready."""


class RaySettings(Settings):
    address: str = "auto"
    """host:port of the Ray cluster's head. auto: RAY_ADDRESS, or the cluster of this machine."""

    namespace: str = "headrace"
    """Names this system in the Ray cluster: `headrace scale` finds it there. One runs in each."""

    cpus: PositiveFloat = 1.0
    """CPUs that each prefill worker and decode rank takes from Ray, and its compute threads."""

    domain_label: str = ""
    """Label of Ray nodes that is equal within an NVLink domain, such as ray.io/gpu-domain. A decode
    worker then stays in one domain. Empty: one node if that is large enough, else few nodes."""
