"""Check and time the variants of train/triton_products.py. `python bench_tma.py`; --quick: on a CPU, tiny, interpreted.

Every variant is first compiled and checked in a process of its own (all at once), at sizes that are no multiple of a tile;
a variant that hangs or fails there is left out. Then the rest are checked and timed at full size, one after the other.
"""

import os
import subprocess
import sys
import time

QUICK, ONE = "--quick" in sys.argv, sys.argv[sys.argv.index("--one") + 1] if "--one" in sys.argv else None
if QUICK:
    os.environ["TRITON_INTERPRET"] = "1"
import torch  # noqa: E402

if QUICK:
    from tests.train.test_triton_kernels import mend_interpreter
    from tests.train.test_triton_products import mend_products_of_bfloat16

    mend_interpreter()
    mend_products_of_bfloat16()
from train import triton_products as products  # noqa: E402
from train.triton_kernels import TritonKernels  # noqa: E402

DEVICE = "cpu" if QUICK else "cuda"
BF16 = torch.bfloat16


def inputs(B, F, d):
    make = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(B, d, device=DEVICE, generator=make).to(BF16)
    w = torch.randn(F, d, device=DEVICE, generator=make)
    w = (w / w.norm(dim=1, keepdim=True)).to(BF16)
    bias = torch.full((F,), -2.6, device=DEVICE)  # 0.5 % active, 150 of 32,768
    bias[0], bias[F // 2] = 90.0, -90.0
    return x, w, bias


def unpacked(bits):
    return (bits[:, :, None] >> torch.arange(32, device=DEVICE) & 1).flatten(1).bool()


def error(pairs):
    """Relative error of got against wanted over pairs of chunks."""
    off = norm = 0.0
    for got, wanted in pairs:
        off += float((got.float() - wanted).double().square().sum())
        norm += float(wanted.double().square().sum())
    return (off / norm) ** 0.5


def check_encode(x, w, bias, z, tiling):
    z.fill_(torch.nan)
    a = products.encode(x, w, bias, z, tiling)
    rows = 2048
    wt = w.float().t()
    e = error((z[i : i + rows], torch.relu(x[i : i + rows].float() @ wt + bias)) for i in range(0, len(x), rows))
    assert e < 3e-3, f"z is off by {e:.1e}"
    count, total = torch.zeros(len(w), dtype=torch.int64, device=DEVICE), 0.0
    for i in range(0, len(x), rows):
        part = z[i : i + rows]
        active = part > 0
        assert torch.equal(a.row_count[i : i + rows], active.sum(1, dtype=torch.int32)), "row_count"
        bits = unpacked(a.bits[i : i + rows])
        assert torch.equal(bits[:, : len(w)], active) and not bits[:, len(w) :].any(), "bits"
        count += active.sum(0)
        total += float(part.sum(dtype=torch.float64))
    assert torch.equal(a.feature_count, count.int()), "feature_count"
    assert abs(float(a.total) - total) < 1e-5 * total, f"total {float(a.total)} and not {total}"
    b = products.encode(x, w, bias, z, tiling)
    assert torch.equal(a.total, b.total) and torch.equal(a.bits, b.bits), "two runs differ"
    return e, a.bits


def check_hidden_grad(g, w, bits, gz, tiling):
    gz.fill_(torch.nan)
    l1 = 0.3125
    sums = products.hidden_grad(g, w, bits, l1, gz, tiling)
    rows, wt = 2048, w.float().t()

    def pairs():
        for i in range(0, len(g), rows):
            active = unpacked(bits[i : i + rows])[:, : len(w)]
            assert not gz[i : i + rows][~active].any(), "not active and not 0"
            yield gz[i : i + rows], torch.where(active, g[i : i + rows].float() @ wt + l1, 0.0)

    e = error(pairs())
    assert e < 3e-3, f"gz is off by {e:.1e}"
    wanted = sum(gz[i : i + rows].sum(0, dtype=torch.float64) for i in range(0, len(g), rows))
    off = float((sums.double() - wanted).norm() / wanted.norm())
    assert off < 1e-5, f"column sums are off by {off:.1e}"
    assert torch.equal(sums, products.hidden_grad(g, w, bits, l1, gz, tiling)), "two runs differ"
    return e


def check(product, tiling, B, F, d, out=None):
    x, w, bias = inputs(B, F, d)
    out = torch.empty(B, F, dtype=BF16, device=DEVICE) if out is None else out
    if product is products.encode:
        return check_encode(x, w, bias, out, tiling)[0]
    # Bits of about as many entries, most of them close together.
    bits = torch.zeros(B, -(-F // 32), dtype=torch.int32, device=DEVICE)
    bits[:: 7, ::5] = 0x40000801 - 2**31
    bits[:, 0] = -1
    return check_hidden_grad(x, w, bits, out, tiling)


def timed(f, n=10):
    for _ in range(3):
        f()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in events:
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[n // 2]


def guarded(name, f):
    try:
        ms, note = f()
        print(f"{name:95s} {ms:7.3f} ms {2 * FULL[0] * FULL[1] * FULL[2] / ms / 1e9:6.0f} TFLOP/s  {note}", flush=True)
    except Exception as e:
        print(f"{name:95s} FAILED {type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True)


# The same specialisation as at full size (everything a multiple of 16), but no multiple of a tile.
SMALL = (200, 272, 80) if QUICK else (2000, 2032, 1008)
FULL = (32768, 32768, 1024)
listed = products.variants()
if "--only" in sys.argv:
    listed = [v for v in listed if sys.argv[sys.argv.index("--only") + 1] in v[0]]

if ONE is not None:
    name, product, tiling = listed[int(ONE)]
    e = check(product, tiling, *SMALL)
    check(product, tiling, 256, 1024, 64)  # other specialisations are not compiled by this: all multiples of 16
    print(f"ok {e:.1e}")
    sys.exit()

started = time.time()
if QUICK:
    for name, product, tiling in listed:
        print(f"{name:95s} error {check(product, tiling, *SMALL):.1e} {time.time() - started:5.1f} s", flush=True)
    sys.exit()

print(torch.cuda.get_device_name(), torch.__version__, products.triton.__version__, flush=True)
only = sys.argv[sys.argv.index("--only") : sys.argv.index("--only") + 2] if "--only" in sys.argv else []
workers = [
    subprocess.Popen([sys.executable, __file__, "--one", str(i), *only], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for i in range(len(listed))
]
good = []
for (name, product, tiling), worker in zip(listed, workers, strict=True):
    try:
        said = worker.communicate(timeout=max(5, 45 - (time.time() - started)))[0]
    except subprocess.TimeoutExpired:
        worker.kill()
        said = "TIMED OUT"
    ok = worker.returncode == 0
    good += [(name, product, tiling)] if ok else []
    print(f"small: {name:88s} {said.strip().splitlines()[-1][:200] if said.strip() else worker.returncode}", flush=True)
print(f"{time.time() - started:.0f} s", flush=True)

torch.backends.cuda.matmul.allow_tf32 = False
x, w, bias = inputs(*FULL)
z = torch.empty(FULL[0], FULL[1], dtype=BF16, device=DEVICE)
gz = torch.empty_like(z)
kernels = TritonKernels()
bias_bf16 = bias.to(BF16)
state = {}


def apart():
    torch.mm(x, w.t(), out=z)
    state["bits"] = kernels.activate_(z, bias).bits


def apart_back():
    torch.mm(x, w.t(), out=gz)
    kernels.mask_(gz, z, 0.3125)


guarded("torch.mm", lambda: (timed(lambda: torch.mm(x, w.t(), out=z)), ""))
guarded("torch.mm, activate_", lambda: (timed(apart), f"L0 {float((z > 0).sum()) / len(z):.0f}"))
guarded("torch.mm, mask_", lambda: (timed(apart_back), ""))
guarded("_addmm_activation", lambda: (timed(lambda: torch._addmm_activation(bias_bf16, x, w.t())), "relu in cuBLAS's epilogue"))


def measure(product, tiling):
    if product is products.encode:
        ms = timed(lambda: products.encode(x, w, bias, z, tiling))
        return ms, f"checked, error {check_encode(x, w, bias, z, tiling)[0]:.1e}"
    bits = state["bits"]
    ms = timed(lambda: products.hidden_grad(x, w, bits, 0.3125, gz, tiling))
    return ms, f"checked, error {check_hidden_grad(x, w, bits, gz, tiling):.1e}"


for name, product, tiling in good:
    guarded(name, lambda p=product, t=tiling: measure(p, t))
guarded("torch.mm again", lambda: (timed(lambda: torch.mm(x, w.t(), out=z)), ""))
print(f"{time.time() - started:.0f} s")
