"""Triton programs that write and read the bytes of groups, one program per group: bit packing stays on the GPU.

Streams are made and read byte by byte without atomics: a program first writes an intermediate array (gaps, or one
byte for every bit of the unary stream) and then gathers from it. The bytes are those of group.py.
"""

# No `from __future__ import annotations` here: Triton reads the annotations as they are.
import triton
import triton.language as tl


@triton.jit
def pack_groups(  # type: ignore[no-untyped-def]
    positions, codes, scale_codes, ratios, exponents, edges, kept_before, slots, gaps, ones, out, lengths,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write group g to out[slots[g]:] and its length to lengths[g].

    positions (in their chunk), codes [coefficients]; scale_codes, ratios [chunks]; exponents [groups]; edges [groups +
    1] chunk numbers; kept_before [chunks + 1]. Scratch: gaps [coefficients], ones: zeros, 8 for every byte of `out`.
    CHUNKS: at least the chunks of a group.
    """
    g = tl.program_id(0)
    chunk, i = tl.arange(0, CHUNKS), tl.arange(0, BLOCK)
    a, num_chunks = tl.load(edges + g), (tl.load(edges + g + 1) - tl.load(edges + g)).to(tl.int32)
    first, slot = tl.load(kept_before + a), tl.load(slots + g)
    n = (tl.load(kept_before + a + num_chunks) - first).to(tl.int32)
    there = chunk < num_chunks
    heads = tl.load(kept_before + a + chunk, mask=there, other=first).to(tl.int32) - first.to(tl.int32)
    r_all = tl.arange(0, 32)
    high_sums = tl.zeros((32,), tl.int32)
    for start in range(0, n, BLOCK):
        mine = start + i < n
        place = tl.load(positions + first + start + i, mask=mine, other=0)
        before = tl.load(positions + first + start + i - 1, mask=mine & (start + i > 0), other=-1)
        is_head = tl.max(((start + i)[:, None] == heads[None, :]).to(tl.int32), 1) == 1
        gap = tl.where(mine, place - tl.where(is_head, -1, before) - 1, 0)
        tl.store(gaps + first + start + i, gap, mask=mine)
        high_sums += tl.sum(gap[:, None] >> r_all[None, :], 0)
    costs = tl.where(r_all <= 16, high_sums + n * r_all, 0x7FFFFFFF)
    r = tl.min(tl.where(costs == tl.min(costs, 0), r_all, 32), 0)
    tl.store(out + slot, tl.load(exponents + g).to(tl.uint8))
    tl.store(out + slot + 1, r.to(tl.uint8))
    tl.store(
        out + slot + 2 + chunk, tl.load(scale_codes + a + chunk, mask=there, other=0).to(tl.uint8), mask=there
    )
    at = slot + 2 + num_chunks
    if BITS > 1:
        ratio = tl.load(ratios + a + chunk, mask=there, other=0)
        tl.store(out + at + chunk, ratio.to(tl.uint8), mask=there)
        at += num_chunks
    tl.debug_barrier()  # what one thread stored, another may load
    num_bytes = (n * BITS + 7) // 8
    for start in range(0, num_bytes, BLOCK):
        byte = tl.zeros((BLOCK,), tl.int32)
        for j in tl.static_range(8):
            t = (start + i) * 8 + j
            code = tl.load(codes + first + t // BITS, mask=t < n * BITS, other=0)
            byte |= ((code >> (t % BITS)) & 1) << j
        tl.store(out + at + start + i, byte.to(tl.uint8), mask=start + i < num_bytes)
    at += num_bytes
    num_bytes = (n * r + 7) // 8
    width = tl.maximum(r, 1)
    for start in range(0, num_bytes, BLOCK):
        byte = tl.zeros((BLOCK,), tl.int32)
        for j in tl.static_range(8):
            t = (start + i) * 8 + j
            gap = tl.load(gaps + first + t // width, mask=t < n * r, other=0)
            byte |= ((gap >> (t % width)) & 1) << j
        tl.store(out + at + start + i, byte.to(tl.uint8), mask=start + i < num_bytes)
    at += num_bytes
    num_bits = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        mine = start + i < n
        steps = tl.where(mine, (tl.load(gaps + first + start + i, mask=mine, other=0) >> r) + 1, 0)
        end = num_bits + tl.cumsum(steps, 0) - 1
        tl.store(ones + slot * 8 + end, tl.full((BLOCK,), 1, tl.uint8), mask=mine)
        num_bits += tl.sum(steps, 0)
    tl.debug_barrier()
    num_bytes = (num_bits + 7) // 8
    for start in range(0, num_bytes, BLOCK):
        mine = start + i < num_bytes
        byte = tl.zeros((BLOCK,), tl.int32)
        for j in tl.static_range(8):
            byte |= tl.load(ones + slot * 8 + (start + i) * 8 + j, mask=mine, other=0).to(tl.int32) << j
        tl.store(out + at + start + i, byte.to(tl.uint8), mask=mine)
    tl.store(lengths + g, at + num_bytes - slot)


@triton.jit
def unpack_groups(  # type: ignore[no-untyped-def]
    data, bounds, edges, kept_before, sizes, ends, running, positions, codes, scale_bits, ratios, bad,
    num_groups, num_chunks_all, num_kept_all,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Read group g of section s, which is data[bounds[s, g] : bounds[s, g + 1]].

    Out: positions (in their chunk), codes [sections, coefficients]; scale_bits (of the fp32 scale), ratios [sections,
    chunks]; bad[s, g] <- 1 if a read would leave the group or a position its chunk: nothing is written out of place
    then either. Scratch: ends i32, running i64 [sections, coefficients]. LOW, HIGH: range of exponents.
    """
    g, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, i = tl.arange(0, CHUNKS), tl.arange(0, BLOCK)
    begin, end = tl.load(bounds + s * (num_groups + 1) + g), tl.load(bounds + s * (num_groups + 1) + g + 1)
    a, num_chunks = tl.load(edges + g), (tl.load(edges + g + 1) - tl.load(edges + g)).to(tl.int32)
    first = tl.load(kept_before + a)
    n = (tl.load(kept_before + a + num_chunks) - first).to(tl.int32)
    there = chunk < num_chunks
    heads = tl.load(kept_before + a + chunk, mask=there, other=first + n).to(tl.int32) - first.to(tl.int32)
    mine_at = s * num_kept_all + first
    exponent = tl.load(data + begin, mask=begin < end, other=1).to(tl.int32)
    r = tl.load(data + begin + 1, mask=begin + 1 < end, other=32).to(tl.int32)
    wrong = ((exponent != 0) & ((exponent < LOW) | (exponent > HIGH))) | (r > 16)
    r = tl.minimum(r, 16)
    at = begin + 2
    code = tl.load(data + at + chunk, mask=there & (at + chunk < end), other=0).to(tl.int32)
    bits = tl.where((code == 0) | (exponent == 0), 0, (code + ((exponent - 15) << 4)) << 19)
    tl.store(scale_bits + s * num_chunks_all + a + chunk, bits, mask=there)
    at += num_chunks
    ratio = tl.zeros((CHUNKS,), tl.int32)
    if BITS > 1:
        ratio = tl.load(data + at + chunk, mask=there & (at + chunk < end), other=0).to(tl.int32)
        at += num_chunks
    tl.store(ratios + s * num_chunks_all + a + chunk, ratio, mask=there)
    for start in range(0, n, BLOCK):
        mine, t = start + i < n, (start + i) * BITS
        byte = at + t // 8
        word = tl.load(data + byte, mask=mine & (byte < end), other=0).to(tl.int32)
        if BITS == 16:
            word |= tl.load(data + byte + 1, mask=mine & (byte + 1 < end), other=0).to(tl.int32) << 8
        tl.store(codes + mine_at + start + i, (word >> (t % 8)) & ((1 << BITS) - 1), mask=mine)
    low_at = at + (n * BITS + 7) // 8
    at = low_at + (n * r + 7) // 8
    count = tl.zeros((), tl.int32)
    num_bits = tl.maximum(end - at, 0).to(tl.int32) * 8
    for start in range(0, num_bits, BLOCK):
        t = start + i
        byte = tl.load(data + at + t // 8, mask=t < num_bits, other=0).to(tl.int32)
        one = (byte >> (t % 8)) & 1
        rank = count + tl.cumsum(one, 0) - 1
        tl.store(ends + mine_at + rank, t, mask=(one == 1) & (rank < n))
        count += tl.sum(one, 0)
    wrong = wrong | (count != n)
    tl.debug_barrier()  # what one thread stored, another may load
    total = tl.zeros((), tl.int64)
    usable = tl.where(wrong, 0, n)
    for start in range(0, usable, BLOCK):
        mine, t = start + i < n, (start + i) * r
        one = tl.load(ends + mine_at + start + i, mask=mine, other=0)
        before = tl.load(ends + mine_at + start + i - 1, mask=mine & (start + i > 0), other=-1)
        low = tl.zeros((BLOCK,), tl.int32)
        for j in tl.static_range(3):
            byte = low_at + t // 8 + j
            low |= tl.load(data + byte, mask=mine & (byte < end), other=0).to(tl.int32) << (8 * j)
        low = (low >> (t % 8)) & ((1 << r) - 1)
        step = ((one - before - 1).to(tl.int64) << r) + low + 1
        tl.store(running + mine_at + start + i, total + tl.cumsum(tl.where(mine, step, 0), 0), mask=mine)
        total += tl.sum(tl.where(mine, step, 0), 0)
    tl.debug_barrier()
    for start in range(0, n, BLOCK):
        mine = start + i < n
        good = start + i < usable
        earlier = (heads[None, :] <= (start + i)[:, None]) & there[None, :]
        head = tl.max(tl.where(earlier, heads[None, :], 0), 1)
        number = tl.sum(earlier.to(tl.int32), 1) - 1
        base = tl.load(running + mine_at + head - 1, mask=good & (head > 0), other=0)
        place = tl.load(running + mine_at + start + i, mask=good, other=1) - 1 - base
        outside = place >= tl.load(sizes + a + number, mask=mine, other=1)
        wrong = wrong | (tl.max((mine & outside).to(tl.int32), 0) == 1)
        tl.store(positions + mine_at + start + i, tl.where(good & ~outside, place, 0).to(tl.int32), mask=mine)
    tl.store(bad + s * num_groups + g, wrong.to(tl.int32))
