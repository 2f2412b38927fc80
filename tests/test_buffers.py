"""What a compiled program holds at the peak of its memory, read from its text."""

import jax
import jax.numpy as jnp
import pytest

from vmamba_jax.training.buffers import Held, held_at_peak

PROGRAM = """HloModule jit_step, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias) }

%body (carried: (s32[], f32[2,8,128])) -> (s32[], f32[2,8,128]) {
  %carried = (s32[]{:T(128)}, f32[2,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %stack = f32[2,8,128]{2,1,0:T(8,128)} get-tuple-element(%carried), index=1
  %row = f32[8,128]{1,0:T(8,128)} sine(%i), metadata={op_name="jit(step)/jvp(Net)/while/body/closed_call/block/fc1/sin"}
  %rows = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%row)
  %filled = f32[2,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%stack, %rows, %i), metadata={op_name="jit(step)/jvp(Net)/while/body/dynamic_update_slice"}
  %next = s32[]{:T(128)} add(%i, %i)
  ROOT %out = (s32[]{:T(128)}, f32[2,8,128]{2,1,0:T(8,128)}) tuple(%next, %filled)
}

%still (carried: (s32[], f32[2,8,128])) -> pred[] {
  %carried.1 = (s32[]{:T(128)}, f32[2,8,128]{2,1,0:T(8,128)}) parameter(0)
  ROOT %more = pred[]{:T(512)} constant(false)
}

ENTRY %main (w: bf16[3,96]) -> (f32[], bf16[3,96]) {
  %w = bf16[3,96]{1,0:T(8,128)(2,1)} parameter(0)
  %fast = f32[8,128]{1,0:T(8,128)S(1)} copy(%w)
  %zero = f32[2,8,128]{2,1,0:T(8,128)} broadcast(%w), metadata={op_name="jit(step)/jvp(Net)/broadcast_in_dim"}
  %start = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, f32[2,8,128]{2,1,0:T(8,128)}) tuple(%start, %zero)
  %loop = (s32[]{:T(128)}, f32[2,8,128]{2,1,0:T(8,128)}) while(%tuple), condition=%still, body=%body
  %kept = f32[2,8,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
  %big = f32[4,8,128]{2,1,0:T(8,128)} add(%kept, %fast), metadata={op_name="jit(step)/transpose(jvp(Net))/block/rematted_computation/norm/mul"}
  %loss = f32[]{:T(128)} reduce(%big)
  %new = bf16[3,96]{1,0:T(8,128)(2,1)} add(%w, %w)
  ROOT %result = (f32[]{:T(128)}, bf16[3,96]{1,0:T(8,128)(2,1)}) tuple(%loss, %new)
}
"""  # noqa: E501


def test_arrays_are_counted_as_they_are_laid_out_from_where_they_are_made_to_their_last_use():
    # 3 x 96 numbers of bfloat16 fill 8 x 128; `fast` lies elsewhere, and `new` is written over the
    # argument.
    assert held_at_peak(PROGRAM) == [
        Held("block/norm", "recomputed mul", "f32[4,8,128]", 1, 16384),
        Held("block/fc1", "forward sin", "f32[2,8,128]", 1, 8192),
        Held("", "argument", "bf16[3,96]", 1, 2048),
    ]


def test_in_a_loop_the_peak_may_be_within():
    program = PROGRAM.replace("f32[4,8,128]", "f32[8,128]").replace(
        "{2,1,0:T(8,128)} add(%k", "{1,0:T(8,128)} add(%k"
    )
    assert [held.array for held in held_at_peak(program)][:2] == ["f32[2,8,128]", "f32[8,128]"]


def test_what_a_gradient_keeps_is_found_by_its_layer():
    def loss(x: jax.Array) -> jax.Array:
        def block(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            with jax.named_scope("layer"):
                return jnp.sin(x) @ x, None

        return jax.lax.scan(block, x, length=50)[0].sum()

    x = jnp.zeros((64, 64))
    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    held = held_at_peak(str(compiled.as_text()))
    stacks = [h for h in held if h.array == "f32[50,64,64]"]
    assert stacks
    assert {h.size // h.number for h in stacks} == {50 * 64 * 64 * 4}
    memory = compiled.memory_analysis()
    assert memory is not None
    expected = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    assert sum(h.size for h in held) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "text",
    ["", "HloModule other", PROGRAM.replace(" body=%body", ""), PROGRAM.replace("s32[]", "?")],
    ids=["nothing", "no instructions", "a loop without its body", "no types"],
)
def test_a_program_that_is_written_otherwise_is_refused_in_one_way(text: str):
    with pytest.raises(ValueError, match="in a way that is not known here"):
        held_at_peak(text)
