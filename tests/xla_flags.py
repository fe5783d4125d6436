"""XLA flags of the test suite: 8 simulated devices, and little optimization.

The suite compiles far more than it computes, and XLA compiles these programs in a third of the time without
optimization. `test_default_optimization.py` runs tests as users compile.
"""

import mmap
import pathlib

import jaxlib

FLAGS = (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
  # With this scheduler and the flags above, XLA counted nine participants in an all-reduce of eight devices on a busy machine,
  # and aborted the process.
  "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)


def known(flags=FLAGS) -> str:
  """The flags that the installed jaxlib knows: XLA aborts the process on any other.

  The library contains their names between zero bytes, and names of removed flags only inside descriptions of messages.
  """
  names = {flag: b"\0%b\0" % flag.removeprefix("--").partition("=")[0].encode() for flag in flags}
  libraries = sorted(
    pathlib.Path(jaxlib.__file__).parent.glob("*.so"), key=lambda p: p.stat().st_size
  )
  with (
    libraries[-1].open("rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
  ):
    return " ".join(flag for flag, name in names.items() if text.find(name) >= 0)
