import torch

from engine.model_runner import SequenceStep, batch_from

CPU = torch.device("cpu")


def test_sequences_are_packed_end_to_end_with_their_slots() -> None:
    batch = batch_from(
        [
            SequenceStep(token_ids=[11, 12, 13], start=2, block_table=[7, 3]),
            SequenceStep(token_ids=[21], start=0, block_table=[5], wants_logits=False),
            SequenceStep(token_ids=[31], start=8, block_table=[1, 9, 2]),
        ],
        block_tokens=4,
        device=CPU,
    )
    assert batch.token_ids.tolist() == [11, 12, 13, 21, 31]
    assert batch.positions.tolist() == [2, 3, 4, 0, 8]
    assert batch.slot_mapping.tolist() == [7 * 4 + 2, 7 * 4 + 3, 3 * 4, 5 * 4, 2 * 4]
    assert batch.block_tables.tolist() == [[7, 3, 0], [5, 0, 0], [1, 9, 2]]
    assert batch.query_lens == (3, 1, 1)
    assert batch.context_lens == (5, 1, 9)
    assert batch.logits_rows.tolist() == [2, 4]
    assert not batch.decode_only


def test_no_sequences_make_an_idle_batch() -> None:
    batch = batch_from([], block_tokens=16, device=CPU)
    assert batch.num_tokens == 0
    assert batch.block_tables.shape == (0, 0)
    assert batch.logits_rows.shape == (0,)
    assert batch.decode_only
