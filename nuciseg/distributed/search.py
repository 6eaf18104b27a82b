"""A search through Ray Tune: trials, their scheduler and sampler, interruption and resumption, the ranked result."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Integer

from nuciseg.buckets import BucketFolder
from nuciseg.config import Config, load_config, write_config
from nuciseg.distributed.cluster import Need, connect, device_of_trial, require_room_for_runs, worker_need
from nuciseg.distributed.failures import forget_failure, note_failure, noted_failure, with_one_retry
from nuciseg.distributed.final import FINAL_FOLDER
from nuciseg.distributed.forgiveness import Forgiveness
from nuciseg.distributed.limits import (
    ClosedError,
    Limits,
    SearchEndedError,
    reopen,
    trials_within_disk,
    wait_where_closed,
)
from nuciseg.distributed.mirror import Mirror, working_copy
from nuciseg.distributed.newcomers import Newcomers
from nuciseg.distributed.nodes import node_must_go
from nuciseg.distributed.progress import SearchProgress
from nuciseg.distributed.runs import HANDED_OVER, check_storage, files_of_nodes
from nuciseg.distributed.space import build_space, configure
from nuciseg.distributed.storage import await_seen
from nuciseg.distributed.training import fit_workers, reported, storage_of_ray
from nuciseg.distributed.trials import RESULTS_FILE, SAMPLE_FILE, Trial, best_first, describe, plain_values
from nuciseg.distributed.twins import take_over_twin
from nuciseg.distributed.watchdog import ended_where_it_hangs
from nuciseg.distributed.worker import CONFIG_FILE, SPLIT_FILE, Job, best_score, conclude_stopped, run_worker
from nuciseg.engine.checkpoint import TRAINING_FILE, CheckpointStore, load_checkpoint, write_json
from nuciseg.engine.datasets import check_data
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import EpochReport
from nuciseg.errors import ConfigError, NucisegError, TrainingError
from nuciseg.metrics import rank
from nuciseg.patience import names_in, patiently
from nuciseg.tracking import RunIdentity

_OPTUNA_LACKS = ("randn", "qrandn", "qloguniform", "qlograndint")  # Ray's link to it fails, or drops the step


@dataclass(frozen=True)
class Plan:
    """What every trial knows of its search. Of one in a bucket the folder is the driver's copy."""

    base: Config
    search: Mirror
    need: Need
    verbose: bool

    @property
    def folder(self) -> Path:
        return self.search.folder

    def trial_mirror(self, trial_id: str) -> Mirror:
        """In a trial, on whatever node: its folder."""
        if self.search.uri is None:
            return self.search.inner(trial_id)
        return working_copy(f"{self.search.uri}/{trial_id}", "trial")


def check_search(config: Config, *, verbose: bool) -> None:
    """Raise ConfigError or ResourceError for a search that cannot be run, before a folder is made for it."""
    _scheduler(config, _search_space(config))
    connect(verbose)
    _concurrent_trials(config, worker_need(config.scale, for_trial=True))


def start_search(config: Config, folder: Path | Mirror, *, verbose: bool) -> list[Trial]:
    """Run the search that `config.search` describes into `folder`; returns the trials, best first.

    Raises SearchEndedError, which has the trials so far, where a bound of `config.search` ended it before.
    """
    space = _search_space(config)
    plan = _plan(config, folder, verbose)
    concurrent = _concurrent_trials(config, plan.need)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_config(config, plan.folder / CONFIG_FILE)
    plan.search.push()
    tuner = tune.Tuner(
        _trainable(plan),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=1 if config.search.sampler == "grid" else config.search.num_trials,
            search_alg=_sampler(config, concurrent),
            scheduler=_scheduler(config, space),
            max_concurrent_trials=concurrent if config.search.sampler == "optuna" else None,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=_run_config(config, plan.search, concurrent),
    )
    return _fit(tuner, plan)


def resume_search(config: Config, folder: Path | Mirror, *, verbose: bool) -> list[Trial]:
    """Go on with an interrupted search: finished trials are kept, running ones go on from their checkpoints.

    `config` is what `read_search_config` finds in `folder`. Raises as `start_search` does.
    """
    check_data(config)  # a drive that is not there yet must not end every trial
    plan = _plan(config, folder, verbose)
    concurrent = _concurrent_trials(config, plan.need)
    check_storage(config, plan.search.uri or plan.folder)
    storage = storage_of_ray(plan.search)
    path, system = storage["storage_path"], storage.get("storage_filesystem")
    if not tune.Tuner.can_restore(path, storage_filesystem=system):
        return start_search(config, folder, verbose=verbose)  # killed before Tune wrote anything
    for trial in _trial_mirrors(plan):
        if not isinstance(noted_failure(trial.folder), TrainingError | None):
            forget_failure(trial.folder)
            trial.push()
    tuner = tune.Tuner.restore(
        path,
        storage_filesystem=system,
        trainable=_trainable(plan),
        param_space=_search_space(config),
        resume_unfinished=True,
        restart_errored=True,
    )
    # What was stored with the search knows the folder that it had on the machine where it began.
    tuner._local_tuner.get_run_config().callbacks = _callbacks(config, plan.search, concurrent)
    return _fit(tuner, plan)


def read_search_config(search: Mirror) -> Config:
    """The configuration of a search. Raises ConfigError where there is none."""
    if not (search.folder / CONFIG_FILE).exists():
        raise ConfigError(f"--resume {search}: no search there (it has no {CONFIG_FILE}); give the folder tune printed")
    config = load_config(search.folder / CONFIG_FILE)
    if (search.folder / SPLIT_FILE).exists():
        raise ConfigError(f"--resume {search} is a training run, not a search; resume it with `nuciseg train`")
    return config


def winner(trials: Sequence[Trial], base: Config) -> Config | None:
    """The best trial's configuration with the search's own `train.epochs`, or None where every trial failed."""
    best = next((trial for trial in trials if trial.failure is None and trial.epochs > 0), None)
    return configure(base, best.sample) if best is not None else None


# --- a trial ---------------------------------------------------------------------------------------------------------


def _run_trial(sample: dict[str, Any], plan: Plan) -> None:
    """One trial. A training that cannot go on is over; what a user may mend is raised, so that `--resume` tries again.

    Both stand noted in the trial's folder, where the last table finds the reason.
    """
    with contextlib.suppress(TrainingError), ended_where_it_hangs():
        _attempt(sample, plan)


def _attempt(sample: dict[str, Any], plan: Plan) -> None:
    trial_id = tune.get_context().get_trial_id()
    assert trial_id is not None  # this runs in a trial
    if plan.search.uri is None:
        await_seen(plan.folder / CONFIG_FILE)  # on a node that joined after the search had begun
    wait_where_closed(plan.search, trial_id)
    mirror = plan.trial_mirror(trial_id)
    mirror.fetch()
    run_dir = mirror.folder
    write_json(sample, run_dir / SAMPLE_FILE)
    failure = noted_failure(run_dir)
    if failure is not None:
        raise failure
    try:
        job = _trial_job(sample, plan, mirror)
        # Larger trials' workers have the GPUs; this process, on a head without one, only looks after them.
        device = torch.device("cpu") if job.config.scale.max_workers > 1 else device_of_trial(plan.need)
    except NucisegError as error:
        note_failure(run_dir, error)
        mirror.push()
        raise
    if mirror.uri is None:
        take_over_twin(job, plan.folder)
    if job.config.scale.max_workers > 1:
        fit_workers(job, plan.need, callbacks=[TuneReportCallback()])
        # Tune may have missed the last reports of the workers; what it keeps of a trial is the last one it heard.
        tune.report(_last_report(job))
        return
    with_one_retry(partial(_run_alone, job, plan, device), run_dir)


def _trial_job(sample: Mapping[str, Any], plan: Plan, trial: Mirror) -> Job:
    trial_id = trial.folder.name
    epochs = plan.base.search.trial_epochs or plan.base.train.epochs
    config = configure(plan.base, {**sample, "train.epochs": epochs, "train.calibrate": False})
    identity = RunIdentity(
        id=f"{plan.folder.name}-{trial_id}",
        name=f"{trial_id.rsplit('_', 1)[-1]} {describe(sample)}",
        group=plan.base.run.group or plan.folder.name,
        job_type="tune",
        tags=(config.model.kind, getattr(config.model, "encoder", config.model.kind), config.target.kind),
    )
    return Job(config, trial.folder, identity, plan.verbose, trial.uri)


def _run_alone(job: Job, plan: Plan, device: torch.device) -> None:
    torch.set_num_threads(plan.need.cpus)
    population_based = plan.base.search.scheduler == "pbt"
    store = CheckpointStore(job.run_dir)
    handed_over = tune.get_checkpoint()
    if handed_over is not None:
        with handed_over.as_directory() as folder:
            store.adopt(Path(folder))

    reports = 0

    def report(epoch: EpochReport) -> None:
        nonlocal reports
        checkpoint = None
        if population_based and epoch.checkpoint is not None:
            checkpoint = tune.Checkpoint.from_directory(str(epoch.checkpoint))
        tune.report(reported(epoch, job), checkpoint=checkpoint)
        reports += 1

    run_worker(job, Place(device=device), report, node_must_go)
    if not reports:  # it had ended when the driver was killed, which may not have heard its last report
        tune.report(_last_report(job))


def _last_report(job: Job) -> dict[str, Any]:
    last = CheckpointStore(job.run_dir).last
    assert last is not None  # the workers ended well, so there is an epoch
    history = load_checkpoint(last).progress.history
    return {**history[-1], "score": best_score(history, job.config.train.metric)}


# --- Ray Tune's parts ------------------------------------------------------------------------------------------------


def _plan(config: Config, folder: Path | Mirror, verbose: bool) -> Plan:
    connect(verbose)
    search = folder if isinstance(folder, Mirror) else Mirror(folder, below=False)
    search = replace(search, folder=search.folder.resolve())  # Ray takes a relative path for an address
    return Plan(config, search, worker_need(config.scale, for_trial=True), verbose)


def _trainable(plan: Plan) -> Any:
    # A trial of several workers holds no CPU itself, not a hundredth of one: trials could take what their own workers
    # need, and wait for ever. Tune wants it to hold something; on the head node it outlives a lost worker node.
    alone = plan.base.scale.max_workers == 1
    resources = {"CPU": plan.need.cpus, "GPU": plan.need.gpus} if alone else {"node:__internal_head__": 0.001}
    return tune.with_resources(tune.with_parameters(_run_trial, plan=plan), resources)


def _concurrent_trials(config: Config, need: Need) -> int:
    room = require_room_for_runs(config.scale, need)
    return min(room, config.search.max_concurrent or room, trials_within_disk(config) or room)


def _search_space(config: Config) -> dict[str, Any]:
    space = build_space(config)
    gridded = [key for key, line in config.search.space.items() if "grid_search" in line]
    if config.search.sampler == "grid":
        free = [key for key, line in config.search.space.items() if not {"grid_search", "choice"} & set(line)]
        if free:
            raise ConfigError(
                f"search.space.{free[0]}: the grid sampler needs `choice`; or set search.sampler to random"
            )
        return {
            key: tune.grid_search(line.categories) if hasattr(line, "categories") else line
            for key, line in space.items()
        }
    unknown = [key for key, line in config.search.space.items() if set(_OPTUNA_LACKS) & set(line)]
    if unknown and config.search.sampler == "optuna":
        raise ConfigError(
            f"search.space.{unknown[0]}: the optuna sampler knows none of {', '.join(_OPTUNA_LACKS)}; take another "
            "line, or set search.sampler to random"
        )
    if gridded and config.search.sampler == "optuna":
        raise ConfigError(f"search.space.{gridded[0]}: the optuna sampler takes `choice`, not `grid_search`")
    return space


def _sampler(config: Config, concurrent: int) -> Searcher | BasicVariantGenerator:
    if config.search.sampler == "optuna":
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return OptunaSearch(metric="score", mode="max", sampler=optuna.samplers.TPESampler(seed=config.seed))
    return BasicVariantGenerator(max_concurrent=concurrent, random_state=config.seed)


def _scheduler(config: Config, space: Mapping[str, Any]) -> TrialScheduler:
    search = config.search
    epochs = search.trial_epochs or config.train.epochs
    if search.scheduler == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            max_t=epochs + 1,  # a trial that reaches its last epoch ends by itself, and in order
            grace_period=min(search.grace_epochs, epochs),
            reduction_factor=search.reduction_factor,
        )
    if search.scheduler == "pbt":
        return _population_based(config, space)
    return FIFOScheduler()


def _population_based(config: Config, space: Mapping[str, Any]) -> PopulationBasedTraining:
    if config.scale.max_workers > 1:
        raise ConfigError("search.scheduler pbt needs trials of one worker: set scale.num_workers to 1, or use asha")
    if config.search.sampler == "optuna":
        raise ConfigError("search.scheduler pbt draws by itself: set search.sampler to random")
    belongs_to_weights = ("model", "target", "data", "optim.kind", "train.ema_decay")
    fixed = [key for key in space if key in belongs_to_weights or key.split(".")[0] in belongs_to_weights]
    if fixed:
        raise ConfigError(f"search.space.{fixed[0]}: pbt hands weights from trial to trial, so this key must be fixed")
    return PopulationBasedTraining(
        time_attr="epoch",
        perturbation_interval=config.search.grace_epochs,
        # Choices go as lists: Ray multiplies what else comes as a domain by 0.8 or 1.2, and limits it by nothing.
        hyperparam_mutations={key: getattr(domain, "categories", domain) for key, domain in space.items()},
        custom_explore_fn=partial(_within_bounds, dict(space)),
    )


def _within_bounds(space: Mapping[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    within = dict(sample)
    for key, domain in space.items():
        if hasattr(domain, "lower"):  # integers stay below their upper bound
            highest = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
            within[key] = min(max(sample[key], domain.lower), highest)
    return within


def _run_config(config: Config, search: Mirror, concurrent: int) -> tune.RunConfig:
    storage = storage_of_ray(search)
    return tune.RunConfig(
        **{**storage, "storage_path": str(Path(storage["storage_path"]).parent)},
        name=search.folder.name,
        verbose=0,
        callbacks=_callbacks(config, search, concurrent),
        # A trial whose process died goes on from its checkpoint; one with a noted failure ends again at once.
        failure_config=tune.FailureConfig(max_failures=config.run.max_failures),  # in a row: see Forgiveness
        checkpoint_config=tune.CheckpointConfig(num_to_keep=HANDED_OVER),
    )


def _callbacks(config: Config, search: Mirror, concurrent: int) -> list[tune.Callback]:
    return [
        SearchProgress(config, search, concurrent),
        Forgiveness(config.run.max_failures),
        Limits(search, concurrent),
        Newcomers(search.folder if search.uri is None else None, files_of_nodes(config)),
    ]


# --- the result ------------------------------------------------------------------------------------------------------


def _fit(tuner: tune.Tuner, plan: Plan) -> list[Trial]:
    # Tune would take Ctrl+C for the regular end of the search: its winner would be trained and evaluated.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    reopen(plan.search)
    try:
        return _concluded(tuner.fit(), plan, frozenset())
    except ClosedError as closed:
        storage = storage_of_ray(plan.search)
        analysis = tune.ExperimentAnalysis(
            storage["storage_path"], storage_filesystem=storage.get("storage_filesystem"), trials=list(closed.trials)
        )
        trials = _concluded(tune.ResultGrid(analysis), plan, closed.unfinished)
        raise SearchEndedError(closed.describe(plan.search, trials), trials) from None


def _concluded(results: tune.ResultGrid, plan: Plan, unfinished: Collection[str]) -> list[Trial]:
    """The trials that came to an epoch or a failure, best first; those that can go on are not logged to their end."""
    _trial_mirrors(plan)
    found = [_trial(each, plan.base, plan.folder) for each in results]
    trials = best_first(
        trial for trial in found if trial.epochs or trial.failure is not None or trial.id not in unfinished
    )
    for trial in trials:
        if trial.failure is None and trial.id not in unfinished:
            conclude_stopped(_trial_job(trial.sample, plan, plan.search.inner(trial.id)))
    write_json([asdict(trial) for trial in trials], plan.folder / RESULTS_FILE)
    plan.search.push()
    return trials


def _trial_mirrors(plan: Plan) -> list[Mirror]:
    """The folders of all trials in the driver, of those in a bucket all but what only their training needs."""
    if plan.search.uri is None:
        return [plan.search.inner(name) for name in names_in(plan.folder)]
    there = patiently(BucketFolder(plan.search.uri).files)
    names = {file.name.split("/")[0] for file in there if "/" in file.name}
    mirrors = [plan.search.inner(name) for name in sorted(names) if not name.startswith(".") and name != FINAL_FOLDER]
    for mirror in mirrors:
        mirror.fetch(lambda name: not name.endswith(f"/{TRAINING_FILE}"))
    return mirrors


def _sample_of(run_dir: Path, result: Any) -> Mapping[str, Any]:
    # Ray keeps it with the reports: after a resumption a trial that failed before its first one has none.
    path = run_dir / SAMPLE_FILE
    sample: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else result.config or {}
    return sample


def _trial(result: Any, config: Config, folder: Path) -> Trial:
    trial_id = Path(result.path).name
    run_dir = folder / trial_id
    sample = _sample_of(run_dir, result)
    last = CheckpointStore(run_dir).last
    # The checkpoint is asked, not Ray: Ray's record of a trial ends with the last report that reached the driver.
    history = load_checkpoint(last).progress.history if last is not None else ()
    failure = noted_failure(run_dir) or result.error
    best = _best_rank(run_dir, config.train.metric)
    return Trial(
        id=trial_id,
        sample=plain_values(sample),
        score=best[0],
        tie_break=best[1],
        epochs=len(history),
        seconds=sum(row["train_s"] + row["validation_s"] for row in history),
        failure=None if failure is None else str(failure).strip().splitlines()[-1],
    )


def _best_rank(run_dir: Path, metric: str) -> tuple[float, float] | tuple[None, None]:
    # Not the best of the history: with population-based training that may belong to another trial's weights.
    best = CheckpointStore(run_dir).best
    return rank(load_checkpoint(best).scores, metric) if best is not None else (None, None)
