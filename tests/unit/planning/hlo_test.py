"""Parsing compiled programs: small ones in HLO syntax with figures computed by hand, and a real one."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_lm.planning import hlo, topologies
from diffusion_lm.planning.accelerators import parse
from diffusion_lm.planning.collectives import Collective, collectives
from diffusion_lm.planning.roofline import roofline

# Two rows of two devices. A loop with three iterations gathers weights; an all-reduce follows. One fusion reads one
# slice of a stack of ten; one collective is split over two fusions; arrays in S(1) are in on-chip memory.
PROGRAM = """HloModule jit_step, is_scheduled=true

%reader (stack: f32[10,64], index: s32[]) -> f32[64] {
  %stack = f32[10,64]{1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64]{1,0} dynamic-slice(%stack, %index, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%slice)
}

%start (part: bf16[8,16]) -> bf16[16,16] {
  %part = bf16[8,16]{1,0} parameter(0)
  ROOT %gather.1 = bf16[16,16]{1,0} all-gather(%part), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'y'}
}

%finish (part.2: bf16[8,16]) -> bf16[16,16] {
  %part.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[16,16]{1,0} all-gather(%part.2), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'y'}
}

%scatterer (whole: f32[32]) -> f32[16] {
  %whole = f32[32]{0} parameter(0)
  %sum = f32[32]{0} all-reduce(%whole), channel_id=9, replica_groups={{0,2},{1,3}}, to_apply=%add
  %zero.2 = s32[] constant(0)
  ROOT %mine = f32[16]{0} dynamic-slice(%sum, %zero.2), dynamic_slice_sizes={16}
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[], bf16[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(3)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state.2: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state.2 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %w = bf16[8,16]{1,0} get-tuple-element(%state.2), index=1
  %a = bf16[16,16]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%start
  %b = bf16[16,16]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%finish
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%i.2, %w)
}

ENTRY %main (stack.1: f32[10,64], i.1: s32[], w.1: bf16[8,16], g: f32[32]) -> f32[64] {
  %stack.1 = f32[10,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %w.1 = bf16[8,16]{1,0} parameter(2)
  %g = f32[32]{0} parameter(3)
  %begin = (s32[], bf16[8,16]{1,0}) tuple(%i.1, %w.1)
  %loop = (s32[], bf16[8,16]{1,0}) while(%begin), condition=%condition, body=%body
  %total = f32[4]{0} all-reduce(%g), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  %scattered = f32[16]{0} fusion(%g), kind=kCustom, calls=%scatterer
  ROOT %row = f32[64]{0} fusion(%stack.1, %i.1), kind=kLoop, calls=%reader, metadata={op_name="jit(step)/read"}
}
"""


def test_collectives_of_a_program():
    found = {(one.kind, one.group): one for one in collectives(hlo.parse(PROGRAM), devices_per_slice=2)}
    # 16 x 16 x 2 bytes, half of them sent, three iterations; the channel is counted once per iteration.
    assert found["all-gather", 2] == Collective("all-gather", 2, 2, count=3, bytes=3 * 512 / 2)
    assert found["all-reduce", 4] == Collective("all-reduce", 4, 2, count=1, bytes=2 * 16 * 3 / 4)
    # An all-reduce whose fusion uses half of the result: each sends the other half. {0,2} and {1,3} cross slices.
    assert found["reduce-scatter", 2] == Collective("reduce-scatter", 2, 1, count=1, bytes=64)
    assert len(found) == 3


def test_memory_traffic_of_a_program():
    module = hlo.parse(PROGRAM)
    loop = 3 * 2 * (8 * 16 * 2)  # both fusions read w; what they return stays on the chip
    total = 32 * 4 + 4 * 4
    scattered = 32 * 4 + 16 * 4
    row = 64 * 4 + 4 + 64 * 4  # one slice of the stack, the index, the result
    assert module.hbm_bytes() == loop + total + scattered + row


# Arrays in S(1) are in on-chip memory. Asynchronous copies and slices list their operands; one collective moves two
# arrays; one of two branches runs; a gather reads only its rows; an allocation writes nothing.
ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%rows (table: f32[100,8], wanted: s32[2]) -> f32[2,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %wanted = s32[2]{0} parameter(1)
  ROOT %taken = f32[2,8]{1,0} gather(%table, %wanted), offset_dims={1}, slice_sizes={1,8}
}

%small (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %copied = f32[8]{0} copy(%s)
}

%large (l: f32[8]) -> f32[8] {
  %l = f32[8]{0} parameter(0)
  %wide = f32[1000]{0} broadcast(%l), dimensions={}
  ROOT %back = f32[8]{0} slice(%wide), slice={[0:8]}
}

ENTRY %main (table.1: f32[100,8], wanted.1: s32[2], which: pred[], x: f32[8], y: f32[32], z: bf16[16]) -> f32[2,8] {
  %table.1 = f32[100,8]{1,0} parameter(0)
  %wanted.1 = s32[2]{0} parameter(1)
  %which = pred[] parameter(2)
  %x = f32[8]{0} parameter(3)
  %y = f32[32]{0} parameter(4)
  %z = bf16[16]{0} parameter(5)
  %empty = f32[64]{0} custom-call(), custom_call_target="AllocateBuffer"
  %in = (f32[32]{0:S(1)}, f32[32]{0}, u32[]{:S(2)}) copy-start(%y)
  %inside = f32[32]{0:S(1)} copy-done(%in)
  %part = ((f32[32]{0}), f32[4]{0:S(1)}, s32[]{:S(2)}) slice-start(%y), slice={[4:8]}
  %parted = f32[4]{0:S(1)} slice-done(%part)
  %both = ((f32[32]{0}, bf16[16]{0}), (f32[8]{0}, bf16[4]{0})) reduce-scatter-start(%y, %z), replica_groups=[1,4]<=[4]
  %done = (f32[8]{0}, bf16[4]{0}) reduce-scatter-done(%both)
  %chosen = f32[8]{0} conditional(%which, %x, %x), true_computation=%small, false_computation=%large
  ROOT %row = f32[2,8]{1,0} fusion(%table.1, %wanted.1), kind=kLoop, calls=%rows
}
"""


def test_memory_traffic_of_asynchronous_conditional_and_partial_instructions():
    module = hlo.parse(ASYNCHRONOUS)
    copy, part = 32 * 4, 4 * 4
    scatter = (32 * 4 + 16 * 2) + (8 * 4 + 4 * 2)
    dearer_branch = (8 * 4 + 1000 * 4) + 2 * 8 * 4
    gather = 2 * 8 * 4 + 2 * 4 + 2 * 8 * 4
    assert module.hbm_bytes() == copy + part + scatter + dearer_branch + gather


def test_a_collective_of_several_arrays_counts_all_of_them():
    (found,) = collectives(hlo.parse(ASYNCHRONOUS), devices_per_slice=4)
    assert found == Collective("reduce-scatter", 4, 4, count=1, bytes=(8 * 4 + 4 * 2) * 3)


def test_devices_of_one_slice_share_the_traffic_between_slices():
    gather = Collective("all-gather", 16, 8, count=1, bytes=800.0)
    assert gather.crosses_slices
    assert gather.bytes_across == 100.0
    scattered = Collective("all-to-all", 16, 8, count=1, bytes=1500.0)
    assert scattered.bytes_across == 800.0, "each sends to eight of fifteen others"
    two_machines = topologies.parse("h100-16")
    found = roofline(two_machines, flops=0, hbm_bytes=0, collectives=(gather,))
    assert (found.ici, found.dcn) == (800 / 450e9, 100 / 50e9)


def test_roofline_by_hand():
    v5e = parse("v5e-16")
    moved = (Collective("all-gather", 16, 16, 1, 2e9), Collective("all-reduce", 2, 1, 1, 3.1e9))
    found = roofline(v5e, flops=16 * 197e12, hbm_bytes=819e9 / 2, collectives=moved)
    assert found.compute == pytest.approx(1.0)
    assert found.hbm == pytest.approx(0.5)
    assert found.ici == pytest.approx(0.01)  # all four links of the chip
    assert found.dcn == pytest.approx(1.0)
    assert found.seconds == pytest.approx(1.0)
    within_a_row = roofline(v5e, 0, 0, (Collective("all-gather", 4, 4, 1, 1e9),))
    assert within_a_row.ici == pytest.approx(0.01), "a group of one row of the torus has half of the links"


# An all-gather that overlaps with arithmetic: fusions pass its arrays through without moving them; its start counts the
# traffic. One fusion also writes a slice of a stack. The loop has a run-time condition; its scope gives the maximum.
OVERLAPPED = """HloModule jit_step, is_scheduled=true

%begin (part: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %part = bf16[4,8]{1,0} parameter(0)
  %gather.1 = bf16[16,8]{1,0} all-gather(%part), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %started = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (part.1: bf16[4,8], whole: bf16[16,8], x: f32[8], stack: f32[80]) -> (f32[8], bf16[4,8], bf16[16,8], f32[10,8]) {
  %part.1 = bf16[4,8]{1,0} parameter(0)
  %whole = bf16[16,8]{1,0} parameter(1)
  %x = f32[8]{0} parameter(2)
  %stack = f32[10,8]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %doubled = f32[8]{0} add(%x, %x)
  %row = f32[1,8]{1,0} bitcast(%doubled)
  %gather.2 = bf16[16,8]{1,0} all-gather(%part.1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, \
backend_config={"async_collective_fusion_config":{}}
  %put = f32[10,8]{1,0} dynamic-update-slice(%stack, %row, %zero, %zero)
  ROOT %all = (f32[8]{0}, bf16[4,8]{1,0}, bf16[16,8]{1,0}, f32[10,8]{1,0}) tuple(%doubled, %part.1, %gather.2, %put)
}

%ends (state: (pred[], f32[8])) -> pred[] {
  %state = (pred[], f32[8]{0}) parameter(0)
  ROOT %more = pred[] get-tuple-element(%state), index=0
}

%turn (state.1: (pred[], f32[8])) -> (pred[], f32[8]) {
  %state.1 = (pred[], f32[8]{0}) parameter(0)
  %more.1 = pred[]{:S(2)} get-tuple-element(%state.1), index=0
  %y = f32[8]{0} get-tuple-element(%state.1), index=1
  %z = f32[8]{0} negate(%y)
  ROOT %next = (pred[], f32[8]{0}) tuple(%more.1, %z)
}

ENTRY %main (p: bf16[4,8], v: f32[8], s: f32[10,8], first: (pred[], f32[8])) -> (pred[], f32[8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %v = f32[8]{0} parameter(1)
  %s = f32[10,8]{1,0} parameter(2)
  %first = (pred[], f32[8]{0}) parameter(3)
  %starting = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%p), kind=kCustom, calls=%begin
  %q = bf16[4,8]{1,0} get-tuple-element(%starting), index=0
  %w = bf16[16,8]{1,0} get-tuple-element(%starting), index=1
  %going = (f32[8]{0}, bf16[4,8]{1,0}, bf16[16,8]{1,0}, f32[10,8]{1,0}) fusion(%q, %w, %v, %s), kind=kLoop, calls=%step
  ROOT %loop = (pred[], f32[8]{0}) while(%first), condition=%ends, body=%turn, metadata={op_name="f/at_most_5/while"}
}
""".replace("\\\n", "")


def test_arrays_that_pass_through_are_not_moved_and_a_scope_gives_the_trip_count():
    gather = 4 * 8 * 2 + (4 * 8 * 2 + 16 * 8 * 2)
    step = 8 * 4 + 8 * 4 + 8 * 4  # x, what is made of it, its row of the stack
    turns = 5 * 2 * 8 * 4
    assert hlo.parse(OVERLAPPED).hbm_bytes() == gather + step + turns


@pytest.mark.parametrize("turns", [1, 5])
def test_loops_of_a_real_program_are_counted(turns):
    """The traffic of a scan grows with its length; in XLA's own analysis it does not."""

    def run(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=turns)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    module = hlo.parse(jax.jit(run).lower(x).compile().as_text())
    assert module.hbm_bytes() >= turns * 3 * 64 * 64 * 4 * 0.9
    assert module.hbm_bytes() <= (turns + 2) * 8 * 64 * 64 * 4
