"""Where the time and the bytes of an exchange are booked."""

import torch

from engine.collectives import ExpertGroup
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.meter import ExchangeMeter
from engine.experts.placement import place_evenly
from engine.experts.transports import exact_splits

CPU = torch.device("cpu")


def test_a_layers_call_is_cut_into_dispatch_compute_and_combine() -> None:
    group = ExpertGroup.single(CPU)
    exchange = exact_splits(group, slots_per_rank=2)
    weights = ExpertWeights(gate_up=torch.ones(2, 8, 4), down=torch.ones(2, 4, 4))
    layer = ExpertLayer(weights, place_evenly(2, 1), group, "exact", exchange=exchange)
    for _ in range(3):
        layer(torch.ones(5, 4), torch.tensor([[0, 1]] * 5), torch.ones(5, 2))

    traffic = exchange.meter.traffic()
    assert traffic.layer_calls == 3
    assert min(traffic.dispatch_s, traffic.compute_s, traffic.combine_s) > 0
    assert (traffic.dispatch_bytes, traffic.combine_bytes) == (0, 0)  # a rank alone sends nothing


def test_time_before_resuming_is_nobodys() -> None:
    meter = ExchangeMeter(CPU)
    lap = meter.begin()
    lap.end("dispatch")
    sent = meter.traffic().dispatch_s
    lap.resume()
    assert meter.traffic().dispatch_s == sent
    lap.end("compute")
    assert meter.traffic().dispatch_s == sent


def test_bytes_and_row_exchanges_add_up() -> None:
    meter = ExchangeMeter(CPU, transport="padded", buffer_bytes=7)
    meter.add_group()
    meter.add_interruption(1.25)
    meter.add_interruption(0.5)
    meter.add_step(0.5, in_two=True)
    meter.add_step(0.25, in_two=False)
    for _ in range(2):
        meter.add_bytes("dispatch", 10)
        meter.add_bytes("combine", 3)
        meter.add_row_exchange(0.5, 250_000)
    traffic = meter.traffic()
    assert (traffic.transport, traffic.buffer_bytes, traffic.groups_formed) == ("padded", 7, 1)
    assert traffic.interrupted_s == 1.75
    assert (traffic.steps, traffic.steps_in_two) == (2, 1)
    assert (meter.waited_us, meter.computed_us) == (500_000, 250_000)  # the last ones
    assert (traffic.dispatch_bytes, traffic.combine_bytes) == (20, 6)
    assert (traffic.row_exchanges, traffic.row_exchange_s, traffic.skew_s) == (2, 1.0, 0.5)
