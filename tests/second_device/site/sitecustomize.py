"""Makes the second device known to processes that a test starts."""

import os

if os.environ.get("DIFFUSIONBLOCKS_TEST_DEVICE") == "sim":
    from tests.second_device.device import register

    register()
