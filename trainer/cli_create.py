"""`dtrain create`: prepares a run: its settings in a file, the organizer's key, the signed manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtrain.trainer.cli_flags import add_local_flags, add_run_flags
from dtrain.trainer.cli_run import proposed_manifest, run_folder
from dtrain.trainer.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain create --run-id our-model --preset small --start-workers 2"
    parser.add_argument("--run-id", metavar="NAME", help="what the run is called")
    parser.add_argument("--data", type=Path, help="file or folder that all workers train on")
    add_local_flags(parser)
    parser.add_argument("--check", type=Path, metavar="RUN.TOML", help="only check this run file")
    add_run_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Write the run's files and say what comes next, or check a run file."""
    from dtrain.trainer.manifest import manifest_from_toml, preset_manifest, validate_run_id

    if args.check is not None:
        manifest = manifest_from_toml(args.check, {"run_id": args.run_id})
        print(f"{args.check} is a good run file, of the run {manifest.run_id}.")
        return 0
    if args.run_id is None and args.config is None:
        raise UsageError("what is the run called? type --run-id NAME, or --config with a run file")
    if args.run_id is None:
        args.run_id = manifest_from_toml(args.config).run_id
    run_id = validate_run_id(args.run_id)
    manifest = proposed_manifest(args, run_id) or preset_manifest(run_id)
    return _create(run_id, manifest, args)


def _create(run_id: str, manifest: object, args: argparse.Namespace) -> int:
    from dtrain.trainer.manifest import Manifest
    from dtrain.trainer.run_file import write_run_file
    from dtrain.trainer.signing import OrganizerKey

    assert isinstance(manifest, Manifest)
    folder = run_folder(run_id)
    if (folder / "manifest.json").exists():
        raise UsageError(f"{folder} holds a run already: choose another --run-id, or remove that folder")
    key = OrganizerKey.load_or_create(folder / "organizer.key")
    signed = key.sign(manifest)
    (folder / "run.toml").write_text(write_run_file(manifest, str(folder / "run.toml")))
    (folder / "manifest.json").write_text(signed.to_json())
    data = f" --data {args.data}" if args.data is not None else ""
    for flag in ("tokenizer", "model"):
        name = getattr(args, flag)
        if name is not None and Path(name).exists() and not name.endswith("config.json"):
            data += f" --{flag} {name}"
    print(
        f"The run {run_id} is ready in {folder}, but nobody trains it yet.\n"
        f"  run.toml       its settings, each explained; to change them, remove {folder} and create it anew\n"
        f"  organizer.key  yours alone: who has it can speak for the run. Keep a copy.\n"
        f"  manifest.json  the settings, signed with your key; settings {signed.manifest.hash.hex()[:8]}\n"
        "What comes next:\n"
        f"  dtrain bootstrap --run-id {run_id} --port 31337   on a machine that everybody can reach (optional)\n"
        f"  dtrain worker --run-id {run_id}{data}   begins the training, in this folder\n"
        f"  dtrain invite --run-id {run_id}   prints what others need to join"
    )
    return 0
