"""``python -m hf_fastattn run script.py ...`` and ``python -m hf_fastattn info``.

``run`` executes an unmodified program with "fastattn" registered: importing this package has done that by the time the
program starts. The program is ``__main__``, with its own ``sys.argv``, exit code and traceback.
"""

import argparse
import importlib.util
import io
import os
import platform
import signal
import sys
import types
from importlib.machinery import ModuleSpec
from types import CodeType
from typing import NoReturn

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import IMPLEMENTATION, __version__, auto
from .ops._library import has_triton
from .ops.shapes import MAX_DECODE_QUERY_LEN, MAX_HEAD_DIM

_USAGE = """python -m hf_fastattn run script.py [args ...]
       python -m hf_fastattn run -m module [args ...]
       python -m hf_fastattn info"""


def main(argv: list[str]) -> None:
    """Run the command line given without the program's name."""
    if argv[:1] == ["run"] and len(argv) > 1 and argv[1] not in ("-h", "--help"):
        _run(argv[1:])
        return
    parser = argparse.ArgumentParser(prog="python -m hf_fastattn", usage=_USAGE, description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "info"], help="run a program with fastattn registered, or describe")
    args = parser.parse_args(argv)
    if args.command == "run":
        parser.error("run needs a script, or -m and a module")
    print_info()


def _run(argv: list[str]) -> None:
    """Execute a script or ``-m module`` as __main__."""
    if argv[0] == "-m":
        if len(argv) < 2:
            _fail("run -m needs the name of a module", 2)
        code, spec = _find_module(argv[1])
        filename, program = spec.origin or argv[1], argv[1:]
    else:
        code, spec, filename, program = None, None, argv[0], argv
        if os.path.isdir(filename):
            filename = os.path.join(filename, "__main__.py")
        sys.path[0] = os.path.dirname(os.path.realpath(filename))
    sys.argv = [filename, *program[1:]]
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=filename, __spec__=spec, __builtins__=__builtins__)
    if spec is not None:
        module.__dict__.update(__package__=spec.parent, __loader__=spec.loader)
    sys.modules["__main__"] = module
    try:
        exec(code if code is not None else _compile(filename), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        _report(error)


def _compile(filename: str) -> CodeType:
    try:
        with io.open_code(os.path.abspath(filename)) as file:
            source = file.read()
    except OSError as error:
        _fail(f"can't open file {filename!r}: {error.strerror}", 2)
    return compile(source, filename, "exec")


def _find_module(name: str) -> tuple[CodeType, ModuleSpec]:
    """Return the code and spec that ``python -m name`` would run."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                _fail(f"{name!r} is a package without a __main__ module, so it cannot be run", 1)
    except ModuleNotFoundError as error:
        _fail(f"no module named {error.name!r}, wanted for {name!r}", 1)
    get_code = getattr(spec.loader, "get_code", None) if spec is not None else None
    code = get_code(spec.name) if spec is not None and get_code is not None else None
    if spec is None or code is None:
        _fail(f"no module named {name!r}, or it has no code to run", 1)
    return code, spec


def _report(error: BaseException) -> NoReturn:
    """End as Python does after an uncaught error, with a traceback that starts in the program."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(1)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"python -m hf_fastattn run: {message}\n")
    sys.exit(code)


def print_info() -> None:
    """Print versions, devices, what is supported there, and what is registered."""
    triton = _version("triton") if has_triton() else "not installed (GPUs then run through PyTorch)"
    lines = [
        f"hf_fastattn   {__version__}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}",
        f"transformers  {transformers.__version__}",
        f"triton        {triton}",
        "",
        f"attention implementation {IMPLEMENTATION!r}: {_registered()}",
        f"paged by default: {', '.join(auto.registered()) or 'no family'}; others through hf_fastattn.paged(model)",
        "",
        f"cpu: PyTorch implementation of every op, {torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        lines.append(f"cuda:{index}: {_describe_gpu(index)}")
    if not torch.cuda.device_count():
        lines.append("no CUDA device is visible")
    sys.stdout.write("\n".join(lines) + "\n")


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
    if not has_triton():
        return f"{name}: PyTorch implementation (install triton for the kernels)"
    if properties.major < 8:
        return f"{name}: not tested; the kernels were compiled for 8.0, 8.6, 9.0, 10.0 and 12.0"
    return (
        f"{name}: Triton kernels, fp16, bf16 and fp32, head sizes to {MAX_HEAD_DIM}, "
        f"decode kernel for up to {MAX_DECODE_QUERY_LEN} queries per sequence"
    )


def _registered() -> str:
    return "registered" if IMPLEMENTATION in ALL_ATTENTION_FUNCTIONS.valid_keys() else "NOT registered"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main(sys.argv[1:])
