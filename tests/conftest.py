"""What holds for every room."""

import os
import signal

from hypothesis import HealthCheck, settings

# a busy machine is not a failure
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# no test installs or downloads: what a test starts and reaches for a package or a file elsewhere fails at once
_NOWHERE = "http://127.0.0.1:9"
os.environ |= {"RING_APT": "0", "HF_HUB_OFFLINE": "1", "http_proxy": _NOWHERE, "https_proxy": _NOWHERE}
os.environ["no_proxy"] = "127.0.0.1,localhost"

# a shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
