"""An endpoint with OpenAI's protocol: one model, many prompts, requests decoded together.

bank.py      model and prompts from their folders, as one bank
engine.py    the thread that owns the model: requests join and leave its batch at every step
text.py      tokens to text, piece by piece, up to a stop string
protocol.py  what a request may say
replies.py   what an answer looks like
gate.py      what is refused before a request is read: no key, too large
app.py       the routes
server.py    the socket, signals, and the end
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt_kernels.serve.app import Options
    from softprompt_kernels.serve.bank import Bank, load_bank, named_prompts
    from softprompt_kernels.serve.server import Server, Work, open_socket, serving

__all__ = ["Bank", "Options", "Server", "Work", "load_bank", "named_prompts", "open_socket", "serving"]

_MODULES = {
    "Bank": "softprompt_kernels.serve.bank",
    "Options": "softprompt_kernels.serve.app",
    "Server": "softprompt_kernels.serve.server",
    "Work": "softprompt_kernels.serve.server",
    "load_bank": "softprompt_kernels.serve.bank",
    "named_prompts": "softprompt_kernels.serve.bank",
    "open_socket": "softprompt_kernels.serve.server",
    "serving": "softprompt_kernels.serve.server",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
