"""The network process comes up without what it never uses."""

from __future__ import annotations

import subprocess
import sys

from dtrain.dht.start import put_off


def test_a_module_that_is_put_off_comes_when_it_is_used() -> None:
    """Its import costs nothing; the first use of anything in it brings it in whole."""
    put_off("colorsys")
    assert not hasattr(sys.modules["colorsys"], "__file__")
    import colorsys

    assert colorsys.rgb_to_hsv(1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
    assert sys.modules["colorsys"].__file__


def test_hivemind_comes_without_scipys_optimizers() -> None:
    """They would be half of hivemind's import, and 40 MB."""
    code = (
        "import sys; from dtrain.dht import start; start.put_off('scipy.optimize');"
        "import dtrain.dht.peer; assert 'hivemind.averaging' in sys.modules;"
        "assert 'scipy.linalg' not in sys.modules and 'scipy.sparse' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)
