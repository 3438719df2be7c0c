"""`fastrec pretrain --help` on one screen: the keys that people set, with their defaults."""

KEYS = (
    "data", "output", "init", "task", "resume", "pretrained", "split", "key", "values", "seeds",
    "model.width", "model.max_len", "model.dropout", "model.encoder", "model.tokens",
    "STAGE.views", "STAGE.objectives", "STAGE.steps", "STAGE.batch_size", "STAGE.learning_rate",
    "STAGE.schedule", "STAGE.weight_decay", "STAGE.precision", "STAGE.validate_every",
    "STAGE.patience", "STAGE.devices", "evaluation.candidates", "evaluation.seen",
    "users.fraction", "seed",
)  # fmt: skip


def show_help(parser, command: str) -> None:
    """Print usage, the keys above that the command has, and where the others are."""
    from fastrec.training.config import Stage

    sub = parser._subcommands_action._name_parser_map[command]
    known = {action.dest: action for action in sub._actions}
    stage = _stage_keys(Stage)
    print(f"usage: fastrec {command} --config RECIPE [--KEY VALUE ...]\n\n{sub.description}\n")
    print("  --config               recipe name (fastrec recipes) or YAML file; flags win over it")
    for key in KEYS:
        if key.startswith("STAGE."):
            name = key.removeprefix("STAGE.")
            print(_line(f"--STAGE.{name}", *stage[name]))
        elif key in known:
            action = known[key]
            print(_line(f"--{key}", action.help or "", action.default))
    print(
        "\nSTAGE is pretraining, recommendation, profile or relation. All keys: --help-all;"
        " what a recipe\nsets them to: --print_config."
    )


def _stage_keys(stage) -> dict[str, tuple[str, object]]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(stage, "stage")
    found = {}
    for action in parser._actions:
        if action.dest.startswith("stage."):
            found[action.dest.removeprefix("stage.")] = (action.help or "", action.default)
    return found


def _line(flag: str, text: str, default: object) -> str:
    sentence = " ".join(str(text).split()).split("(required")[0].strip().rstrip(".")
    sentence = sentence.split(". ")[0]
    if len(sentence) > 62:
        sentence = sentence[:60].rsplit(" ", 1)[0] + " .."
    plain = default is None or isinstance(default, (int, float, str, bool))
    end = f" [{default}]" if plain and default is not None else ""
    return f"  {flag:<28} {sentence}{end}"
