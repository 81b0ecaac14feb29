"""The packages that only data mixing needs, asked for before any of its text is read: numba and scikit-learn."""

from importlib.util import find_spec

PACKAGES = {"numba": "numba", "sklearn": "scikit-learn"}
"""Module -> the name under which it is installed."""


class PackagesMissing(ValueError):
    """The extra `mix` was not installed."""


def check_packages() -> None:
    """Asks whether both can be imported, without importing them.

    Raises:
        PackagesMissing: names those that cannot, and the command that installs them.
    """
    if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
        raise PackagesMissing(
            f"data mixing needs {' and '.join(missing)}, which the extra `mix` installs: "
            "pip install 'mobilellm-pro[mix]', or in a checkout pip install -e '.[mix]'"
        )
