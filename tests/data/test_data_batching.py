"""Batches: targets, padding, and a stream that no number of ranks can change."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from cuma_ds.config import DataSection
from cuma_ds.data.batch import EncodedExample, as_filler, collate, encode_example, encode_pair
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import DataError

WHO = ["A person living in Norway.", "A person living in Peru."]


def choice_row(counts, profile=0, question="Tea?"):
    options = ["Yes", "No", "Maybe"][: len(counts)]
    return {
        "profile": profile,
        "question_id": "q",
        "question": question,
        "options": options,
        "counts": counts,
        "group": "",
    }


def example(index: int, length: int | None = None) -> EncodedExample:
    """Tokens that name the example."""
    ids = [10 + index] * (length or 1 + index % 4)
    return EncodedExample(ids, [len(ids) - 1], [index], [1.0], index)


def stream(n, batch, micro, rank=0, world=1, seed=0):
    return Stream(Draw(n, batch, micro, seed, rank, world), lambda row: (example(row),), pad_id=0)


@pytest.mark.parametrize("unit", [1, 1.0, 0.75])
@pytest.mark.parametrize(("weight", "expected"), [("uniform", [0.25, 0.0, 0.75]), ("answers", [2.0, 0.0, 6.0])])
def test_choice_targets_are_letters_weighted_by_answers(tokenizer, weight, expected, unit):
    """Counts may be sums of survey weights."""
    renderer = Renderer(tokenizer, 512)
    expected = expected if weight == "uniform" else [unit * count for count in expected]
    encoded = encode_example(
        choice_row([2 * unit, 0, 6 * unit], profile=1), renderer, WHO, DataSection(example_weight=weight)
    )
    assert encoded.target_weight == expected
    assert tokenizer.convert_ids_to_tokens(encoded.target_token) == ["A", "B", "C"]
    assert encoded.target_position == [len(encoded.input_ids) - 1] * 3
    assert encoded.profile == 1


def test_chat_targets_are_the_following_tokens(tokenizer):
    row = {
        "profile": 1,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
        "group": "",
    }
    encoded = encode_example(row, Renderer(tokenizer, 512), WHO, DataSection())
    assert tokenizer.decode(encoded.target_token) == "Yo<|im_end|>"
    assert encoded.target_token == [encoded.input_ids[position + 1] for position in encoded.target_position]
    assert encoded.target_weight == [1.0, 1.0, 1.0]


def test_a_pair_is_one_prompt_with_either_answer_and_nothing_else_is_a_target(tokenizer):
    row = {
        "profile": 1,
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": "Hello",
        "rejected": "No.",
        "margin": None,
        "group": "",
    }
    renderer = Renderer(tokenizer, 512)
    pair = encode_pair(row, renderer, WHO)
    prompt = renderer.encode_prompt(row["prompt"], WHO[1])
    for encoded, answer in zip(pair, ("Hello<|im_end|>", "No.<|im_end|>"), strict=True):
        assert tokenizer.decode(encoded.target_token) == answer
        assert encoded.input_ids == prompt + encoded.target_token
        assert encoded.target_position == list(range(len(prompt) - 1, len(encoded.input_ids) - 1))
        assert encoded.target_weight == [1.0] * len(answer.replace("<|im_end|>", "|"))
        assert encoded.profile == 1


def test_collate_pads_at_the_end_and_lets_the_model_count_positions():
    batch = collate([example(2), example(0), example(3), example(2)], pad_id=7)
    assert batch.input_ids_BS.tolist() == [[12, 12, 12, 7], [10, 7, 7, 7], [13, 13, 13, 13], [12, 12, 12, 7]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert "position_ids" not in batch.inputs
    assert batch.profile_BS.tolist() == [[0, 0, 0, -1], [1, -1, -1, -1], [2, 2, 2, 2], [3, 3, 3, -1]]
    assert batch.profile_rows_N.tolist() == [2, 0, 3, 2]
    assert batch.targets.example_L.tolist() == [0, 1, 2, 3]
    assert batch.keep.tolist() == [0, 2, 3]
    assert (batch.targets.position_L.tolist(), batch.targets.row_L.tolist()) == ([1, 0, 2, 1], [0, 1, 2, 3])


def test_keep_holds_exactly_the_positions_of_targets():
    early = EncodedExample([1, 2, 3, 4, 5], [1, 3], [3, 5], [1.0, 0.5], 0)
    late = EncodedExample([6, 7], [0], [7], [2.0], 1)
    batch = collate([early, late], pad_id=0)
    assert batch.keep.tolist() == [0, 1, 3]
    kept = batch.input_ids_BS[:, batch.keep]
    assert kept[batch.targets.row_L, batch.targets.position_L].tolist() == [2, 4, 6]
    assert batch.targets.token_L.tolist() == [3, 5, 7]
    assert batch.weight_sum == 3.5


def test_fillers_copy_a_real_row_and_weigh_nothing():
    (batch,) = Stream(Draw(4, 3, 8, 0, world=2, rank=1), lambda row: (example(3),), pad_id=0).step(0)
    assert batch.input_ids_BS[1].tolist() == batch.input_ids_BS[0].tolist()
    assert batch.attention_mask_BS[1].tolist() == [1, 1, 1, 1]
    assert batch.profile_BS[:, 0].tolist() == [0, -1]
    assert batch.targets.weight_L.tolist() == [1.0, 0.0]
    assert len(batch.rows) == 1


def test_a_unit_stays_together_and_its_fillers_have_its_shape():
    """Two examples of a pair share a micro batch, packed or not, and are found again by their numbers."""

    def pair(row: int) -> tuple[EncodedExample, EncodedExample]:
        return example(2 * row, length=2), example(2 * row + 1, length=5)

    for length in (None, 10):
        for rank in range(2):
            source = Stream(Draw(6, 5, 2, 0, rank, world=2), pair, pad_id=0, pack_length=length)
            for batch in source.step(0):
                real = [n for n in range(len(batch.profile_rows_N)) if (batch.profile_BS == n).any()]
                assert batch.profile_rows_N[real].tolist() == [2 * row + side for row in batch.rows for side in (0, 1)]
                names = dict(zip(batch.targets.example_L.tolist(), batch.targets.token_L.tolist(), strict=True))
                assert [names[n] for n in real] == batch.profile_rows_N[real].tolist()
                if length is None:
                    assert len(batch.input_ids_BS) == 2 * source.draw.micro


def test_dtypes_are_as_promised_and_survive_a_move():
    batch = collate([example(1), as_filler(example(2))], pad_id=0).to("cpu")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.int64, name
    for name, value in vars(batch.targets).items():
        assert value.dtype == (torch.float32 if name == "weight_L" else torch.int64), name


def _loss(model, batch):
    logits = model(**batch.inputs).logits
    log_probability = logits[batch.targets.row_L, batch.targets.position_L].log_softmax(-1)
    return -(batch.targets.weight_L * log_probability.gather(1, batch.targets.token_L[:, None])[:, 0]).sum()


def _gradients(model, examples):
    model.zero_grad()
    loss = _loss(model, collate(examples, pad_id=0))
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# Llama computes its norms and rotary angles in float32 whatever its weights are, hence the tolerances below.
@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()


def test_histograms_train_as_single_answers_would(model, tokenizer):
    renderer, config = Renderer(tokenizer, 512), DataSection(example_weight="answers")
    merged_rows = [choice_row([2, 0, 3]), choice_row([1, 2], profile=1, question="Is it cold outside?")]
    single_rows = [
        choice_row([int(option == chosen) for option in range(len(row["counts"]))], row["profile"], row["question"])
        for row in merged_rows
        for chosen, count in enumerate(row["counts"])
        for _ in range(count)
    ]
    assert len(single_rows) == 8
    merged_loss, merged = _gradients(model, [encode_example(row, renderer, WHO, config) for row in merged_rows])
    single_loss, single = _gradients(model, [encode_example(row, renderer, WHO, config) for row in single_rows])
    assert merged.abs().max() > 1e-3
    assert merged_loss == pytest.approx(single_loss, rel=1e-6)
    torch.testing.assert_close(merged, single, rtol=1e-4, atol=5e-6)


def test_padding_and_fillers_change_no_gradient(model, tokenizer):
    renderer = Renderer(tokenizer, 512)
    rows = [choice_row([1, 0, 0]), choice_row([0, 1, 0], question="A much longer question about tea?")]
    examples = [encode_example(row, renderer, WHO, DataSection()) for row in rows]
    together_loss, together = _gradients(model, [*examples, as_filler(examples[0])])
    alone = [_gradients(model, [one]) for one in examples]
    assert together_loss == pytest.approx(sum(loss for loss, _ in alone), rel=1e-6)
    torch.testing.assert_close(together, alone[0][1] + alone[1][1], rtol=1e-4, atol=5e-6)


def _seen(batch):
    """Names of the examples in a batch, fillers apart; the target token names the example."""
    tokens = dict(zip(batch.targets.row_L.tolist(), batch.targets.token_L.tolist(), strict=True))
    return [tokens[row] for row in range(len(batch.profile_BS)) if batch.profile_BS[row, 0] >= 0]


@pytest.mark.parametrize(("n", "batch", "micro"), [(40, 12, 6), (7, 12, 5), (100, 5, 2), (3, 10, 1)])
def test_world_size_never_changes_what_a_step_sees(n, batch, micro):
    order = np.concatenate([np.random.default_rng([3, epoch]).permutation(n) for epoch in range(20)])
    for step in range(5):
        expected = Counter(order[step * batch : (step + 1) * batch].tolist())
        for world in (1, 2, 3, 4, 5):
            seen: Counter = Counter()
            fillers = 0
            for rank in range(world):
                ranks_stream = stream(n, batch, micro, rank, world, seed=3)
                batches = ranks_stream.step(step)
                assert len(batches) == ranks_stream.draw.accumulation
                for one in batches:
                    assert len(one.profile_BS) == ranks_stream.draw.micro <= micro
                    seen.update(_seen(one))
                    assert Counter(one.rows) == Counter(_seen(one))
                    fillers += int((one.profile_BS[:, 0] < 0).sum())
            assert seen == expected
            assert fillers == world * ranks_stream.draw.accumulation * ranks_stream.draw.micro - batch


def test_a_rank_with_nothing_to_do_still_gets_valid_batches():
    lonely = stream(9, 2, 4, rank=3, world=4).step(0)
    assert [one.profile_BS.unique().tolist() for one in lonely] == [[-1]]
    assert lonely[0].weight_sum == 0.0
    assert lonely[0].attention_mask_BS.any()


@pytest.mark.parametrize(
    ("batch", "micro", "world", "accumulation", "rows"),
    [(12, 6, 2, 1, 6), (12, 5, 1, 3, 4), (12, 6, 5, 1, 3), (1, 8, 1, 1, 1)],
)
def test_accumulation_spreads_rows_evenly(batch, micro, world, accumulation, rows):
    one = stream(50, batch, micro, 0, world).draw
    assert (one.accumulation, one.micro) == (accumulation, rows)


def test_each_epoch_shows_every_example_once_in_a_new_order():
    one = stream(10, 5, 5).draw
    epochs = [[index for step in (2 * epoch, 2 * epoch + 1) for index in one.rows(step)[0]] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_steps_can_be_asked_in_any_order_and_depend_on_the_seed():
    forward, backward = stream(10, 4, 4).draw, stream(10, 4, 4).draw
    first = [forward.rows(step) for step in range(30)]
    assert [backward.rows(step) for step in reversed(range(30))] == first[::-1]
    assert first != [stream(10, 4, 4, seed=1).draw.rows(step) for step in range(30)]


def test_no_examples_is_an_error_of_the_user():
    with pytest.raises(DataError, match="no training examples"):
        stream(0, 4, 4)


def test_fillers_stand_only_behind_the_last_example_of_a_step():
    ranks = [stream(100, 10, 2, rank, 3).draw for rank in range(3)]
    in_order = [row for micro_step in range(2) for one in ranks for row in one.rows(0)[micro_step]]
    order = np.random.default_rng([0, 0]).permutation(100)
    assert in_order == order[:10].tolist()
