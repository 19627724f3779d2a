"""Methods as the ``budget`` command reads them, and the candidates of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from vlpet_lightning.budget import Budget, Candidate, Counts, NoValues, Plain, Search, families, sites_of
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.commands.files import as_words, find_config
from vlpet_lightning.model import VLModel
from vlpet_lightning.module import VLModule
from vlpet_lightning.parameters import ParameterReport, count_parameters
from vlpet_lightning.pet import Site
from vlpet_lightning.pet.inject import widths_of
from vlpet_lightning.pet.ranks import ranks_in, trusted
from vlpet_lightning.pet.serialization import check_written, placements_from_plain, placements_to_plain


@dataclass(frozen=True)
class Method:
    """A method's config and what it builds.

    Args:
        name: Name for tables.
        path: Its overlay.
        configs: All config files, the overlay last.
        module: The module of these configs, not built.
        report: Its parameter counts with the ranks of the overlay.
        placements: Its placements as plain data.
        widths: Number of channels of each of its sites.
    """

    name: str
    path: Path
    configs: list[Path]
    module: VLModule
    report: ParameterReport
    placements: Plain
    widths: dict[str, int]

    def count(self, placements: Plain) -> Counts:
        """Count the parameters of the model with other placements."""
        self.module.placements = placements_from_plain(placements, trusted(placements), str(self.path))
        report = count_parameters(_build(self.module))
        return Counts(report.trainable, report.total)

    @property
    def counts(self) -> Counts:
        """Counts with the ranks of the overlay."""
        return Counts(self.report.trainable, self.report.total)

    @property
    def floor(self) -> Counts:
        """Counts without any unit: the visual embedding and whatever else the rules train."""
        parts = [g for name, g in self.report.groups.items() if name.endswith((" PET", " gates", "by all units"))]
        added = sum(part.total for part in parts)
        return Counts(self.report.trainable - sum(part.trainable for part in parts), self.report.total - added)


def _build(module: VLModule) -> VLModel:
    with torch.device("meta"), NoValues():
        return module.build(pretrained=False)


def read_method(name: str, configs: Sequence[Path], overrides: Sequence[str]) -> Method:
    """Read a method's overlay and build its model on the meta device.

    Raises:
        FileNotFoundError: If there is no such method.
        ValueError: If a unit cannot be written to a file, or the config is not valid.
    """
    path = find_config(name, ["pet"])
    files = [*configs, path]
    module = module_from_config([*as_words(files), *overrides])
    placements = placements_to_plain(module.placements)
    check_written(placements)
    model = _build(module)
    return Method(path.stem, path, files, module, count_parameters(model), placements, _widths(model, placements))


def _widths(model: VLModel, placements: Plain) -> dict[str, int]:
    """Return the number of channels of each site of the placements."""
    layers, found = model.backbone.site_layers(model.lm), {}
    for name in sites_of(placements):
        site = model.backbone.sites[name]
        if not isinstance(site, Site):
            found[name] = model.backbone.token_embedding(model.lm).shape[1]
        else:
            found[name] = widths_of(layers[site.stack][0], site, name)[0]
    return found


def check_searchable(method: Method) -> None:
    """Check that a method has a rank.

    Raises:
        ValueError: If it has none; gives what it trains.
    """
    if ranks_in(method.placements):
        return
    cure = "choose a method with a rank, such as vlpet_large"
    if method.module.extension is not None:
        cure = "ranks of Hugging Face peft are not searched; count with `params --model.peft.init_args.r N`"
    raise ValueError(
        f"{method.name} has no rank to choose: it trains {method.counts.trained:,} of {method.counts.total:,} "
        f"parameters, {method.counts.percent:.2f} %; {cure}"
    )


def candidates(method: Method, budget: Budget, limit: int | None, console: Console) -> list[Candidate]:
    """Find the candidates of a method.

    Returns:
        First the nearest one that keeps the method's sites and, except for one rank, its ratios; then the one that
        keeps all ratios; then all others by distance.

    Raises:
        ValueError: If the budget is out of reach; gives the least and largest reachable one.
    """
    check_searchable(method)
    search = Search(method.count, method.widths, budget, limit)
    all_families = list(families(method.placements))
    found: dict[str, Candidate] = {}
    for family in track(all_families, f"counting {method.name}", console=console, transient=True):
        candidate = search.nearest(family)
        if candidate is not None:
            found.setdefault(candidate.key(), candidate)
    reached = search.range(all_families)
    if reached is None:
        raise ValueError(f"the units of {method.name} accept no rank up to --max-rank {limit}: raise it")
    if not found:
        raise ValueError(
            f"no rank of {method.name} changes what is trained ({method.counts.trained:,} parameters, "
            f"{method.counts.percent:.2f} %): add the rule pet to trainable"
        )
    least, most = reached
    if not (budget.excess(least) <= 0 <= budget.excess(most) or any(budget.is_met(one) for one in reached)):
        raise ValueError(
            f"{method.name} cannot train {budget} of {method.module.backbone_name}: it reaches {_both(least)} to "
            f"{_both(most)}; {_both(method.floor)} are trained without any unit. Choose a budget in between"
            + (", or raise --max-rank" if budget.excess(most) < 0 else "")
        )

    def distance(candidate: Candidate) -> float:
        return abs(budget.distance(candidate.counts))

    first, *rest = found.values()
    head = [first]
    if first.keeps_method and not budget.is_met(first.counts):
        nearer = [one for one in search.adjusted(all_families[0]) if distance(one) < distance(first)]
        head = sorted([first, *nearer], key=distance)[:1] + [first] * bool(nearer)
    return [*head, *sorted((one for one in rest if one.key() not in {h.key() for h in head}), key=distance)]


def _both(counts: Counts) -> str:
    return f"{counts.trained:,} ({counts.percent:.2f} %)"
