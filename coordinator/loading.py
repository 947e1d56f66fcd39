"""Finding an application by its name on the command line: `module:attribute`."""

import importlib
import sys
from pathlib import Path

from coordinator.app import App
from events.errors import ConfigurationError


def load_app(reference: str) -> App:
    """Return the application that `reference` names, looked for in the current folder, too.

    Raises:
        ConfigurationError: there is none; the text says what is wrong.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{reference!r} names no application; write module:attribute, for example shop:app")
    if module_name.startswith("."):
        raise ConfigurationError(f"there is no module {module_name!r}; write its name as an import would: shop:app")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigurationError(f"there is no module {module_name!r} here or installed") from error
        raise
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        raise ConfigurationError(f"{reference} is no App; {module_name} must say: {attribute} = App(...)")
    return app
