"""Recording as a GPU's graphs do it, on a CPU, and operations that a graph cannot hold."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from vlpet_lightning import cuda_graphs, generation_graphs
from vlpet_lightning.beam_search import search_rules
from vlpet_lightning.cuda_graphs import TrainingGraphs
from vlpet_lightning.generation import graphs_of

# operations whose result's shape or Python value depends on the content of a tensor
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def poison(tensor):
    """Fill a tensor with other values: a recorded kernel has not run yet. Indices stay valid."""
    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


class Tape(TorchDispatchMode):
    """Records operations with their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(WAITING), f"{name} cannot be recorded"
        result = func(*args, **(kwargs or {}))
        read = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        fresh = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in read]
        self.operations.append((func, args, kwargs or {}, result, fresh))
        return result

    def poison(self):
        for *_, fresh in self.operations:
            for tensor in fresh:
                poison(tensor)

    def replay(self):
        for func, args, kwargs, result, fresh in self.operations:
            again = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(tree_flatten(result)[0], again, strict=True):
                if any(old is tensor for tensor in fresh):
                    old.copy_(new)


def record_on_tapes(monkeypatch):
    """Record searches on a CPU; returns the tapes, each with the number of its replays."""
    made = []

    class TapeRecorder:
        def __init__(self, device):
            self.tapes = []
            self.warm = 0

        def warm_up(self, calls):
            for call in calls:
                call()
            self.warm = len(calls)

        def record(self, calls):
            assert self.warm == len(calls), "kernels are loaded in a search before the recording"
            self.warm = 0
            return [self._record(call, first=number == 0) for number, call in enumerate(calls)]

        def _record(self, call, first):
            tape = Tape()
            tape.replays, tape.recorder = 0, self
            with tape:
                result = call()
            tape.poison()
            self.tapes.append(tape)
            made.append(tape)

            def replay():
                tape.replays += 1
                if first:  # all recordings share their memory
                    for other in self.tapes:
                        other.poison()
                tape.replay()

            return result, replay

    monkeypatch.setattr(generation_graphs, "Recorder", TapeRecorder)
    return made


class Hosts(TorchDispatchMode):
    """Records operations that read or write a tensor of the CPU, which a graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(tensor.device.type == "cpu" for tensor in tensors_in((args, kwargs, result))):
            self.found.append(func.overloadpacket.__name__)
        return result


class Copies(TorchFunctionMode):
    """Records tensors that are made of Python values, which are copied from the host; modes below see none of it."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.MAKERS and [] not in args:  # an empty one copies nothing
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def check_device(model, batch, longest=6):
    """Check that a training step and a search touch no tensor of the CPU.

    Args:
        model: Model, moved to the meta device here.
        batch: Its input.
        longest: Number of tokens of a search.
    """
    model.to("meta")
    batch = batch.to("meta")
    inputs = torch.zeros(len(batch), 4, dtype=torch.long, device="meta")
    with Hosts() as hosts, Copies() as copies:
        model.train()._decoder_states(batch, inputs).sum().backward()
        graphs = graphs_of(model)
        rules = search_rules(model.backbone.generation(model.lm.config, 3, longest))
        search = generation_graphs._Search(graphs.steps, graphs.context, batch, rules)
        with torch.no_grad():
            for length in range(1, longest):
                search.advance(length)
    assert hosts.found == copies.found == []


def run_instead(monkeypatch):
    """Run the training function that would be recorded; returns task and shapes of each recording."""
    seen = []

    def record(graphs, task, names, tensors):
        seen.append((task, [tuple(tensor.shape) for tensor in tensors]))
        return cuda_graphs._Computation(graphs.compute, graphs.parameters, task, names)

    monkeypatch.setattr(TrainingGraphs, "_record", record)
    return seen
