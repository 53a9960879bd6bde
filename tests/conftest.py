"""Hypothesis: fresh examples on every run, the failing one printed as a blob that reproduces it.

And one thread for each process: pytest-xdist has a process for each core already, and the threads of NumPy's
and PyTorch's products, which wait for each other in loops, take three times as long there.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # read when NumPy and PyTorch are imported
    os.environ.setdefault(variable, "1")

import hypothesis  # noqa: E402

hypothesis.settings.register_profile("cuflash", deadline=None, print_blob=True)
# compute-sanitizer slows a kernel a hundredfold: the same properties on fewer examples
hypothesis.settings.register_profile("sanitizer", deadline=None, print_blob=True, max_examples=8)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cuflash"))
