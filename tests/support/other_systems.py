"""Other operating systems, as far as Python shows them: code to run before the product."""

# What Python lacks or refuses on Windows, of all that the service and the trainer could use.
WINDOWS = """
import asyncio, functools, os, signal, socket, sys
socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)
for module in ("fcntl", "grp", "pwd", "resource", "termios", "uvloop"):
    sys.modules[module] = None
for owner, names in {
    os: ("EX_TEMPFAIL", "fork", "sched_getaffinity", "getloadavg"),
    signal: ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1"),
    socket: ("AF_UNIX", "SO_REUSEPORT"),
}.items():
    for name in names:
        delattr(owner, name)

def no_signals(*_):
    raise NotImplementedError

asyncio.SelectorEventLoop.add_signal_handler = no_signals
open_file = os.open

def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *arguments, **options)

os.open = open_no_folder
for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(encoding="ascii")  # the part that all code pages share
"""


def as_on(system: str, module: str) -> tuple[str, str]:
    """Return the arguments of Python that run a module as on another system."""
    return "-c", f"{system}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__')"
