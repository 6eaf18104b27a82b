"""One Weights & Biases run behind `tracking.py`: started without surprises, never able to stop training.

wandb is imported on first use. Nothing leaves the machine but what is logged here: no error reports, no code, no git
state, no system statistics, no package list. Offline, nothing leaves it at all.
"""

from __future__ import annotations

import logging
import os
import shlex
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuciseg.errors import ConfigError, ResourceError
from nuciseg.wandb_records import OVERLAY_PREFIX, logged_epochs, wandb_files

Mode = Literal["online", "offline"]

PROBE_TIMEOUT_S = 4.0
INIT_TIMEOUT_S = 20.0
# How long the end of a run may wait for uploads. What is left lies on disk and `wandb sync` sends it.
FINISH_TIMEOUT_S = 60.0
# wandb-core does not flush when its parent is killed and its default of 15 s would lose the last 15 s of a run.
FLUSH_INTERVAL_S = 0.5
SETTLED_S = 2.0  # after which a row that is not in the file will never be
MAX_TAG_LENGTH = 64
FORBIDDEN_IN_ID = set("/\\#?%: \t\n")

log = logging.getLogger("nuciseg.tracking")


@dataclass(frozen=True)
class RunIdentity:
    """Who a run is: `id` survives a resume, `group` is the search it belongs to, `job_type` train, tune or evaluate.

    Raises ConfigError for an id that W&B would refuse.
    """

    id: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.id or len(self.id) > 128 or FORBIDDEN_IN_ID & set(self.id):
            raise ConfigError(
                f"the run id {self.id!r} cannot be used: give 1 to 128 characters without blanks or any of / \\ # ? % :"
            )


def import_wandb(verbose: bool) -> ModuleType:
    """wandb, told before it is imported to stay quiet and to report nothing to its makers."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    if not verbose:
        os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def configured_mode(verbose: bool) -> Literal["online", "offline", "disabled"]:
    """What the user's own W&B set-up asks for: WANDB_MODE (or `wandb offline`) first, else online where a key is.

    The key itself is never returned, so that it can reach no configuration, log or checkpoint.
    """
    wandb = import_wandb(verbose)
    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun"):
        return "offline"
    if settings.mode == "disabled":
        return "disabled"
    return "online" if _has_key(wandb) else "offline"


def _has_key(wandb: ModuleType) -> bool:
    from wandb.sdk.lib.wbauth import read_netrc_auth

    settings = wandb.setup().settings
    try:
        stored = read_netrc_auth(host=settings.base_url)
    except wandb.errors.Error as error:
        log.warning("the W&B key in the netrc file cannot be used (%s): the run is kept offline", error)
        return False
    return bool(os.environ.get("WANDB_API_KEY") or settings.identity_token_file or settings.api_key or stored)


def _reachable(url: str) -> bool:
    """Whether anything answers at `url` within PROBE_TIMEOUT_S, proxies included.

    `wandb.init` alone would wait its whole time-out for each trial of a search. In a thread, because no time-out
    covers the name look-up.
    """
    answered = threading.Event()

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            answered.set()
        except urllib.error.URLError as error:
            # A certificate that only wandb has been told to trust: somebody is there.
            if isinstance(error.reason, ssl.SSLError):
                answered.set()
        except OSError:
            return
        else:
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return answered.is_set()


def silent_server() -> str | None:
    """The address of the W&B server where it does not answer from here; None where it does."""
    base_url = str(import_wandb(verbose=False).setup().settings.base_url)
    return None if _reachable(base_url) else base_url


def require_account() -> str:
    """The W&B user or team that the key belongs to. Raises ConfigError without one, ResourceError without a server."""
    wandb = import_wandb(verbose=False)
    if configured_mode(verbose=False) != "online":
        raise ConfigError("W&B is offline or has no key here: run `wandb login` or set WANDB_API_KEY")
    base_url = wandb.setup().settings.base_url
    if not _reachable(base_url):
        raise ResourceError(f"W&B at {base_url} does not answer; try again where there is a network")
    try:
        entity = wandb.Api().default_entity
    except failures(wandb) as error:
        raise ConfigError(f"W&B at {base_url} refuses the key ({error}): run `wandb login --relogin`") from None
    if not entity:
        raise ConfigError(f"W&B at {base_url} names no user or team for this key; give one with --entity")
    return str(entity)


class WandbRun:
    """One run. Every call to wandb that fails is told once as a warning; training goes on."""

    def __init__(self, wandb: ModuleType, start: Callable[[Mode], Any], mode: Mode, folder: Path) -> None:
        run = start(mode)
        self._wandb = wandb
        self._start = start
        self._run = run
        self._folder = folder
        self._warned = False
        self._rows: dict[int, Mapping[str, float]] = {}  # what this process logged
        self._has_given_up = False
        self._logged_s = time.monotonic()
        self.mode = mode
        self.url: str | None = run.url if mode == "online" else None
        earlier = [path for path in wandb_files(folder) if path != Path(run.settings.sync_file)]
        # Online the server knows what it got; a local file of an online run may hold more than was sent.
        held = [path for path in earlier if mode == "offline" or path.parent.name.startswith("offline-run-")]
        self.metric_epochs, self.overlay_epochs, next_step = logged_epochs(held)
        # An offline leg would count its steps from 0 again and, uploaded, be taken for the rows of the first leg; and
        # `run.step` of wandb 0.31 is 0 in a leg that goes on online, where rows of steps that are over are dropped.
        self._next_step = max(int(run.starting_step), next_step)
        if mode == "online" and (last := run.summary.get("epoch")) is not None:
            self.metric_epochs.update(range(int(last) + 1))
            self.overlay_epochs.update(range(int(last) + 1))
        self._use_epochs_as_axis()

    def _use_epochs_as_axis(self) -> None:
        with self._guard():
            self._run.define_metric("epoch", hidden=True)
            self._run.define_metric("*", step_metric="epoch")

    @contextmanager
    def _guard(self, *, ending: bool = False) -> Iterator[None]:
        try:
            with _wandb_files_in(self._folder):
                yield
        except failures(self._wandb) as error:
            if ending and isinstance(error, TimeoutError):
                raise  # who ends the run says what to do then
            if not self._warned:
                self._warned = True
                log.warning(
                    "W&B failed (%s: %s): training goes on, metrics.jsonl has it all", type(error).__name__, error
                )

    def _log_row(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=self._next_step, commit=True)
        self._next_step += 1
        self._logged_s = time.monotonic()

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One history row, unless this epoch is in the run already."""
        if epoch in self.metric_epochs:
            return
        if self.mode == "offline" and time.monotonic() - self._logged_s > SETTLED_S:
            self._leave_lost_file()
        self.metric_epochs.add(epoch)
        with self._guard():
            self._log_row({**metrics, "epoch": epoch})
            self._rows[epoch] = metrics

    def log_overlays(self, epoch: int, overlays: Mapping[str, NDArray[np.uint8]]) -> None:
        """One picture a key, so that each image has its own panel with an epoch slider."""
        if epoch in self.overlay_epochs:
            return
        self.overlay_epochs.add(epoch)
        with self._guard():
            row = {f"{OVERLAY_PREFIX}{id}": self._wandb.Image(rgb, caption=id) for id, rgb in overlays.items()}
            self._log_row({**row, "epoch": epoch})

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys as one table."""
        self._leave_what_is_lost()
        columns = list(rows[0])
        with self._guard():
            table = self._wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
            self._log_row({name: table})

    def log_checkpoint(self, name: str, folder: Path, aliases: Sequence[str]) -> None:
        """The files of `folder` as an artifact of type `model`. They are not copied: leave them until the upload."""
        self._leave_what_is_lost()
        with self._guard():
            artifact = self._wandb.Artifact(name, type="model")
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                artifact.add_file(
                    str(path), name=path.relative_to(folder).as_posix(), policy="immutable", skip_cache=True
                )
            self._run.log_artifact(artifact, aliases=list(aliases))

    def _leave_what_is_lost(self) -> None:
        """Tables and checkpoints of an online run are sent or lost, and the end of the run would wait for them for a
        quarter of an hour; in the file of an offline one they wait for `wandb sync`."""
        if self.mode == "offline":
            self._leave_lost_file()
        elif not _reachable(base_url := str(self._run.settings.base_url)):
            log.warning("W&B at %s does not answer any more: the run goes on offline in %s", base_url, self._folder)
            self._go_on_offline()

    def _leave_lost_file(self) -> None:
        """Go on in another file where W&B's own has not taken what was logged: after its storage was away W&B may write
        into nothing."""
        with self._guard():
            while not self._has_given_up and self._missing_epochs():
                if time.monotonic() - self._logged_s > SETTLED_S:
                    self._change_file()
                    return
                time.sleep(FLUSH_INTERVAL_S / 5)

    def _missing_epochs(self) -> set[int]:
        return self._rows.keys() - logged_epochs(wandb_files(self._folder))[0]

    def _change_file(self) -> None:
        log.warning("W&B's file in %s lost epochs: the run goes on in another one beside it", self._folder)
        for handler in logging.getLogger("wandb").handlers:
            with suppress(OSError):  # its file may be lost, too; it is opened again by the next line
                handler.close()
        self._go_on_offline()
        for epoch in sorted(self._missing_epochs()):  # what W&B was only slow to write stands there by now
            self._log_row({**self._rows[epoch], "epoch": epoch})

    def _go_on_offline(self) -> None:
        """Ends what was begun, and begins anew; where that fails too, this is the end of W&B in this process."""
        with suppress(TimeoutError):
            self._end(exit_code=0)
        self.mode = "offline"
        self._has_given_up = True
        with self._guard():
            self._run = self._start("offline")
            self._has_given_up = False
        self._use_epochs_as_axis()

    def log_summary(self, values: Mapping[str, Any]) -> None:
        with self._guard():
            self._run.summary.update(dict(values))

    def finish(self, exit_code: int) -> None:
        """End the run; online, wait at most FINISH_TIMEOUT_S for its uploads."""
        try:
            self._end(exit_code)
        except TimeoutError:
            folder = Path(self._run.settings.sync_file).parent
            log.warning(
                "W&B took longer than %.0f s; send the rest with: wandb sync --include-online %s",
                FINISH_TIMEOUT_S,
                shlex.quote(str(folder)),
            )

    def _end(self, exit_code: int) -> None:
        """Raises TimeoutError after FINISH_TIMEOUT_S."""
        try:
            with self._guard(ending=True):
                self._run.finish(exit_code=exit_code)
        finally:
            # `finish` returns before the last rows are on disk and the id is free; the service's end waits for both.
            if self._wandb.setup().most_recent_active_run is None:
                with self._guard():
                    self._wandb.teardown()


def failures(wandb: ModuleType) -> tuple[type[Exception], ...]:
    """What wandb raises when its service, its server or its folder fails."""
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox.mailbox import MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError

    return (
        wandb.errors.Error,
        MailboxClosedError,
        HandleAbandonedError,
        ServerResponseError,
        WandbServiceConnectionError,
        WandbApiFailedError,
        OSError,
    )


def open_run(
    mode: Mode,
    project: str,
    entity: str | None,
    tags: Sequence[str],
    identity: RunIdentity,
    folder: Path,
    config: Mapping[str, Any],
    verbose: bool = False,
) -> WandbRun | None:
    """Start (or go on with) the run `identity.id` in `folder/wandb`.

    An unreachable server makes it an offline run; where W&B does not start at all the answer is None. Both are told
    in one warning.
    """
    wandb = import_wandb(verbose)
    base_url = wandb.setup().settings.base_url

    def start(mode: Mode) -> Any:
        return wandb.init(
            project=project,
            entity=entity,
            id=identity.id,
            name=identity.name,
            group=identity.group,
            job_type=identity.job_type,
            tags=[tag[:MAX_TAG_LENGTH] for tag in (*tags, *identity.tags)],
            config=dict(config),
            dir=str(folder.resolve()),  # W&B's own process may have been started in another folder
            mode=mode,
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=_settings(wandb, verbose),
        )

    if mode == "online" and not _reachable(base_url):
        log.warning("W&B at %s does not answer: the run is kept offline in %s", base_url, folder)
        mode = "offline"
    refusals = failures(wandb)
    try:
        with _wandb_files_in(folder):
            return WandbRun(wandb, start, mode, folder)
    except refusals as error:
        reason = str(error).splitlines()[0]
    if mode == "online":
        log.warning("W&B at %s refused the run (%s): it is kept offline in %s", base_url, reason, folder)
        wandb.teardown()  # the service holds the id of the failed start and would refuse it
        try:
            with _wandb_files_in(folder):
                return WandbRun(wandb, start, "offline", folder)
        except refusals as error:
            reason = str(error).splitlines()[0]
    log.warning("W&B did not start (%s): training goes on, metrics.jsonl has it all", reason)
    return None


@contextmanager
def _wandb_files_in(folder: Path) -> Iterator[None]:
    """Keep what W&B would put into the home directory (its log, tables that wait for their upload) in the run's folder.

    wandb takes these places from the environment only; it is put back, because child processes inherit it.
    """
    ours = {name: str(folder / "wandb") for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _settings(wandb: ModuleType, verbose: bool) -> Any:
    return wandb.Settings(
        silent=not verbose,
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        init_timeout=INIT_TIMEOUT_S,
        login_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_viewer=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
    )
