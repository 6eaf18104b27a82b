"""The view of `nuciseg report` in Weights & Biases: a workspace and a report of runs and searches, as code.

Command    pip install -e '.[dashboard]'
           python tune_configs/dashboard.py RUN_OR_SEARCH...

Needs a W&B key and runs that were uploaded (an offline run's command to do so was printed at its end). Nothing but the
arrangement of the panels is sent; change it here to your liking.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nuciseg.cli import run_verb
from nuciseg.errors import ConfigError, ResourceError
from nuciseg.reporting.parameters import parameters_of
from nuciseg.reporting.records import RunRecord, SearchRecord, read_folder
from nuciseg.tracking import read_identity
from nuciseg.tracking_wandb import OVERLAY_PREFIX, failures, import_wandb, require_account

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ImportError as error:
    if error.name is None or not error.name.startswith("wandb_workspaces"):
        raise
    MISSING = "wandb-workspaces is not installed; pip install -e '.[dashboard]'"
else:
    MISSING = None

Subject = RunRecord | SearchRecord
MORE_CURVES = ("train_loss", "ap_mean_per_image", "border_dice")


def build_workspace(subjects: Sequence[Subject], entity: str, project: str) -> ws.Workspace:
    """The view in which runs can be looked into: curves, parameters, pictures, differences."""
    metric = _metric(subjects)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_title(subjects),
        sections=[
            ws.Section(name="Learning curves", panels=_curves(metric), is_open=True),
            ws.Section(name="Parameters", panels=_parameters(subjects, metric), is_open=True),
            ws.Section(name="Best and worst clusters", panels=_clusters(subjects), is_open=True),
            ws.Section(name="What differs", panels=[wr.RunComparer(diff_only="split")]),
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group").isin(_groups(subjects))],
            order=[ws.Ordering(ws.Summary(f"best_{metric}"), ascending=False)],
            pinned_columns=[f"summary:best_{metric}", *(f"config:{key}.value" for key in ("model", "optim", "loss"))],
        ),
    )


def build_report(subjects: Sequence[Subject], entity: str, project: str) -> wr.Report:
    """The page to send around, its runs ranked best first."""
    metric = _metric(subjects)
    groups = _groups(subjects)

    def grid(panels: Sequence[Any], name: str = "ranked", **filters: Sequence[str]) -> wr.PanelGrid:
        conditions = {"Group": groups, **filters}
        runset = wr.Runset(
            entity=entity,
            project=project,
            name=name,
            filters=[ws.Metric(key).isin(list(values)) for key, values in conditions.items()],
            order=[wr.OrderBy(wr.SummaryMetric(f"best_{metric}"), ascending=False)],
        )
        return wr.PanelGrid(runsets=[runset], panels=list(panels))

    chapters: Mapping[str, wr.PanelGrid] = {
        "Learning curves": grid(_curves(metric)),
        "Parameters": grid(_parameters(subjects, metric)),
        "Best and worst clusters": grid(_clusters(subjects)),
        "What failed": grid([wr.RunComparer(diff_only="split")], "failed", State=("failed", "crashed")),
    }
    blocks = [wr.P(f"Ranked by validation {metric}; {', '.join(groups)}."), wr.TableOfContents()]
    for title, panels in chapters.items():
        blocks += [wr.H2(title), panels]
    return wr.Report(entity=entity, project=project, title=_title(subjects), blocks=blocks, width="fluid")


def _curves(metric: str) -> list[Any]:
    keys = dict.fromkeys((metric, *MORE_CURVES))
    return [_placed(wr.LinePlot(title=key, x="epoch", y=[key], max_runs_to_show=50)) for key in keys]


def _parameters(subjects: Sequence[Subject], metric: str) -> list[Any]:
    columns = []
    for subject in subjects:
        for parameter in parameters_of(subject) if isinstance(subject, SearchRecord) else ():
            line = subject.config.search.space[parameter.key]
            columns += [(key, parameter.is_log) for key in _config_keys(parameter.key, next(iter(line.values())))]
    axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), log=log) for key, log in dict.fromkeys(columns)]
    axes.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(f"best_{metric}")))
    importance = wr.ParameterImportancePlot(with_respect_to=f"best_{metric}")
    return [_placed(wr.ParallelCoordinatesPlot(columns=axes, title="parameters"), width=24), _placed(importance)]


def _config_keys(key: str, arguments: Any) -> list[str]:
    """The settings to show for a line of the search space: of sections, those in which its choices differ."""
    sections = [choice for choice in arguments if isinstance(choice, Mapping)] if isinstance(arguments, list) else []
    inner = dict.fromkeys(name for section in sections for name in section)
    return [f"{key}.{name}" for name in inner if len({str(each.get(name)) for each in sections}) > 1] or [key]


def _clusters(subjects: Sequence[Subject]) -> list[Any]:
    """The pictures that every run logs of the same validation images, and the table of all of them."""
    keys: dict[str, None] = {}
    for subject in subjects:
        runs = [subject] if isinstance(subject, RunRecord) else [each.run for each in subject.trials]
        for run in [run for run in runs if run is not None][:1]:
            ids = sorted(str(row["id"]) for row in run.images)[: run.config.tracking.num_overlays]
            keys |= dict.fromkeys(f"{OVERLAY_PREFIX}{id}" for id in ids)
    table = wr.WeavePanelSummaryTable(table_name="image_scores")
    if not keys:
        return [_placed(table, width=24)]
    pictures = wr.MediaBrowser(title="input | truth | prediction", media_keys=list(keys), num_columns=3)
    return [_placed(pictures, width=24, height=14), _placed(table, width=24, height=10)]


def _placed(panel: Any, width: int = 12, height: int = 8) -> Any:
    panel.layout = wr.Layout(w=width, h=height)
    return panel


def _metric(subjects: Sequence[Subject]) -> str:
    return subjects[0].config.train.metric


def _title(subjects: Sequence[Subject]) -> str:
    return f"nuciseg: {', '.join(subject.name for subject in subjects)}"[:128]


def _groups(subjects: Sequence[Subject]) -> list[str]:
    """What W&B has the runs under: a search's own name, of a run what it was logged as."""
    groups = []
    for subject in subjects:
        identity = read_identity(subject.folder) if isinstance(subject, RunRecord) else None
        groups.append(identity.group if identity is not None else subject.name)
    return list(dict.fromkeys(groups))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the folders, save both views, say where they are. Raises NucisegError."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_OR_SEARCH", help="folder of a run or search")
    parser.add_argument("--entity", help="W&B user or team (default: the runs', or else the key's own)")
    args = parser.parse_args(argv)
    subjects = [read_folder(folder) for folder in args.folders]
    if MISSING is not None:
        raise ConfigError(MISSING)
    own = require_account()
    tracking = subjects[0].config.tracking
    entity = args.entity or tracking.entity or own
    for view in (build_workspace(subjects, entity, tracking.project), build_report(subjects, entity, tracking.project)):
        try:
            view.save()
        except (*failures(import_wandb(verbose=False)), ValueError) as error:
            raise ResourceError(f"W&B did not take the {type(view).__name__.lower()}: {str(error).strip()}") from error
        print(f"{type(view).__name__.lower()}: {view.url}")


if __name__ == "__main__":
    run_verb(main)
