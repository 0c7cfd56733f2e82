"""Triton programs of the CUDA kernel, one program per chunk; `kernels/cuda.py` launches them.

A chunk is a vector of SIZE elements (a power of two, the rest masked), element o at row o // 64, column o % 64 of rows
that are `stride` apart. No result depends on how a program is spread over threads. Launch with
`enable_fp_fusion=False`: a fused multiply-add rounds once where the reference rounds twice. Sums of
magnitudes are exact in fp64 for any data worth sending, and products that are added are exact.
"""

# No `from __future__ import annotations` here: Triton reads the annotations as they are.
import triton
import triton.language as tl


@triton.jit
def _count(magnitudes, cut):  # type: ignore[no-untyped-def]
    return tl.sum((magnitudes >= cut).to(tl.int32), 0)


@triton.jit
def _cut(magnitudes, k, SIZE: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The k-th largest of magnitudes [SIZE] (-1 where masked): bisection on the maxima of lanes, then on all."""
    lanes = tl.max(tl.reshape(magnitudes, (SIZE // LANES, LANES)), 0)
    high = tl.max(lanes, 0) + 1
    low = tl.full((), 0, tl.int32)
    found = tl.where(_count(lanes, low) >= k, SIZE, 0)
    top = high
    while (high - low > 1) & (found > k + k // 8):
        middle = low + (high - low) // 2
        count = _count(lanes, middle)
        low = tl.where(count >= k, middle, low)
        found = tl.where(count >= k, count, found)
        high = tl.where(count >= k, high, middle)
    high = top
    found = _count(magnitudes, low)
    while (high - low > 1) & (found != k):
        middle = low + (high - low) // 2
        count = _count(magnitudes, middle)
        low = tl.where(count >= k, middle, low)
        found = tl.where(count >= k, count, found)
        high = tl.where(count >= k, high, middle)
    return low


@triton.jit
def encode_chunks(  # type: ignore[no-untyped-def]
    source, feedback, starts, strides, sizes, offsets, kept, kept_before, matrix, decay,
    positions, picked, codes, scale_bits, ratios,
    SIZE: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, DCT: tl.constexpr, MAX_SCALE: tl.constexpr,
):  # fmt: skip
    """Fold, select, quantize and subtract, in one pass over a chunk's memory.

    source: the tensor's first element; matrix: DCT-II [64, 64]. Per chunk: starts, strides, sizes, offsets (into
    feedback), kept, kept_before. Out: positions, picked values and codes at kept_before + 0..kept; per chunk
    scale_bits (biased exponent and 4 bits of mantissa) and ratios, both as if the group's exponent were in reach.
    """
    c = tl.program_id(0)
    o = tl.arange(0, SIZE)
    size, k = tl.load(sizes + c), tl.load(kept + c)
    first = tl.load(kept_before + c)
    inside = o < size
    place = source + tl.load(starts + c) + (o // 64) * tl.load(strides + c) + o % 64
    g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if DCT:  # noqa: SIM102  # known when compiling: without it, there is no trace of the transform
        if size == SIZE:
            row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
            basis = tl.load(matrix + row * 64 + column)
            once = tl.dot(basis, tl.reshape(g, (64, 64)), input_precision="ieee")
            g = tl.reshape(tl.dot(basis, tl.trans(once), input_precision="ieee"), (SIZE,))
    kept_place = feedback + tl.load(offsets + c) + o
    a = tl.load(kept_place, mask=inside, other=0.0) * decay
    a = a + g
    magnitude = tl.where(inside, a.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    cut = _cut(magnitude, k, SIZE, LANES)
    above, equal = magnitude > cut, magnitude == cut
    missing = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    x = tl.abs(a).to(tl.float64)
    total = tl.sum(tl.where(chosen, x, 0.0), 0)
    mean = total / k
    upper = chosen & (x >= mean)
    if BITS <= 2:
        num_high = tl.sum(upper.to(tl.int32), 0)
        total_high = tl.sum(tl.where(upper, x, 0.0), 0)
        top = mean if BITS == 1 else total_high / tl.maximum(num_high, 1)
        bottom = (total - total_high) / tl.maximum(k - num_high, 1)
        rounding = 1 << 18
    else:
        top = tl.max(tl.where(chosen, x, 0.0), 0)
        bottom = tl.min(tl.where(chosen, x, float("inf")), 0)
        rounding = (1 << 19) - 1
    bits = tl.minimum((top.to(tl.float32).to(tl.int32, bitcast=True) + rounding) >> 19, MAX_SCALE)
    scale = (bits << 19).to(tl.float32, bitcast=True)
    divisor = tl.where(scale > 0, scale, 1.0).to(tl.float64)
    negative = (a < 0).to(tl.int32)
    if BITS == 1:
        ratio = tl.full((), 0, tl.int32)
        code = negative
        level = tl.where(chosen, scale, 0.0)
    elif BITS == 2:
        exact = bottom * 256.0 / divisor
        down = tl.floor(exact)
        rest = exact - down
        odd = (down.to(tl.int32) & 1) == 1
        rounded = tl.where(
            (rest > 0.5) | ((rest == 0.5) & odd), down + 1.0, down
        )  # half to even, as numpy's rint
        ratio = tl.minimum(rounded, 255.0).to(tl.int32)
        code = negative | (upper.to(tl.int32) << 1)
        level = tl.where(upper, scale, (ratio.to(tl.float32) * scale) * 0.00390625)
    else:
        LEVELS: tl.constexpr = 1 << (BITS - 1)
        ratio = tl.minimum(tl.floor(bottom * 256.0 / divisor), 255.0).to(tl.int32)
        width = LEVELS / (256 - ratio).to(tl.float64)
        number = tl.floor((x * 256.0 / divisor - ratio.to(tl.float64)) * width)
        number = tl.minimum(tl.maximum(number, 0.0), LEVELS - 1.0).to(tl.int32)
        n = ratio * (2 * LEVELS - 1 - 2 * number) + 256 * (2 * number + 1)
        code = negative | (number << 1)
        level = (n.to(tl.float32) * scale) * (1.0 / (1 << (8 + BITS)))
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(positions + first + rank, o, mask=chosen)
    tl.store(picked + first + rank, a, mask=chosen)
    tl.store(codes + first + rank, code, mask=chosen)
    tl.store(scale_bits + c, bits)
    tl.store(ratios + c, ratio)
    tl.store(kept_place, tl.where(chosen, a - tl.where(a < 0, -level, level), a), mask=inside)


@triton.jit
def decode_chunks(  # type: ignore[no-untyped-def]
    output, starts, strides, sizes, kept, kept_before, matrix, positions, codes, scales, ratios, weights,
    total_kept, num_chunks, num_sections, work,
    SIZE: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr, DCT: tl.constexpr,
):  # fmt: skip
    """Sum all sections' coefficients of a chunk, one section after another, and write the chunk.

    positions, codes [sections, total_kept]; scales, ratios [sections, num_chunks]; work: SIZE fp32 per chunk, where
    coefficients are summed before the inverse transform (unused without).
    """
    c = tl.program_id(0)
    o, i = tl.arange(0, SIZE), tl.arange(0, KEPT)
    size, k, first = tl.load(sizes + c), tl.load(kept + c), tl.load(kept_before + c)
    base, stride = output + tl.load(starts + c), tl.load(strides + c)
    if DCT:  # noqa: SIM108  # known when compiling
        transformed = size == SIZE
    else:
        transformed = size < 0
    if transformed:
        base = work + c.to(tl.int64) * SIZE
        stride = tl.full((), 64, tl.int64)
    tl.store(base + (o // 64) * stride + o % 64, tl.zeros((SIZE,), tl.float32), mask=o < size)
    mine = i < k
    for s in range(num_sections):
        tl.debug_barrier()  # what one thread stored, another may load
        step = tl.load(weights + s) * tl.load(scales + s * num_chunks + c)
        ratio = tl.load(ratios + s * num_chunks + c)
        p = tl.load(positions + s * total_kept + first + i, mask=mine, other=0)
        code = tl.load(codes + s * total_kept + first + i, mask=mine, other=0)
        number = code >> 1
        if BITS == 1:
            value = tl.zeros((KEPT,), tl.float32) + step
        elif BITS == 2:
            value = (tl.where(number == 1, 256, ratio).to(tl.float32) * step) * 0.00390625
        else:
            LEVELS: tl.constexpr = 1 << (BITS - 1)
            n = ratio * (2 * LEVELS - 1 - 2 * number) + 256 * (2 * number + 1)
            value = (n.to(tl.float32) * step) * (1.0 / (1 << (8 + BITS)))
        place = base + (p // 64) * stride + p % 64
        before = tl.load(place, mask=mine, other=0.0)
        tl.store(place, before + tl.where((code & 1) == 1, -value, value), mask=mine)
    if DCT:  # noqa: SIM102  # known when compiling: without a transform none of this is in the program
        if transformed:
            tl.debug_barrier()
            row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
            basis = tl.load(matrix + row * 64 + column)
            coefficients = tl.load(base + row * 64 + column)
            once = tl.trans(tl.dot(tl.trans(basis), coefficients, input_precision="ieee"))
            block = tl.dot(tl.trans(basis), once, input_precision="ieee")
            tl.store(output + tl.load(starts + c) + row * tl.load(strides + c) + column, block)
