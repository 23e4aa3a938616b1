"""Trains a network and leaves a run folder.

    python -m mnist_flax.main --config=FILE[:DATASET] [--workdir=DIR] [--config.KEY=VALUE ...]

FILE is a recipe such as configs/larger.py, DATASET another data set than MNIST, such as digits.
Without --workdir the run folder is runs/NAME-TIME. The same command on the same folder resumes.
"""

import itertools
import os
import re
import sys
from datetime import datetime

from absl import flags
from ml_collections import ConfigDict, config_flags

from mnist_flax import cli, report, signals, train
from mnist_flax import config as config_lib
from mnist_flax.errors import UserError

_NAME_A_RECIPE = "name a recipe: --config=configs/larger.py or --config=configs/larger.py:digits"


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\nKEY is one of these; what a recipe does not set is:")
        for key, value in config_lib.flatten(config_lib.default()).items():
            print(f"  {key}={value}")
        return
    config, workdir = parse()
    args = sys.argv[1:]
    if workdir is None:
        # To the microsecond, as a shell starts several runs in one second.
        # A recipe that lacks its name is refused below.
        workdir = f"runs/{config.get('name')}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        args.append(f"--workdir={workdir}")
    try:
        train.train_and_evaluate(config, workdir)
    except signals.Stopped as stop:
        report.stopped(str(stop), report.command("main", *args))
        sys.exit(128 + stop.signum)


def parse() -> tuple[ConfigDict, str | None]:
    """The configuration and the run folder that `sys.argv` asks for.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, no readable recipe file.
    """
    values = flags.FlagValues()
    workdir = flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    # A shell expands ~ at the start of a word only.
    argv = [
        re.sub(r"^(--?config=)(~.*)", lambda m: m[1] + os.path.expanduser(m[2]), arg)
        for arg in sys.argv
    ]
    for arg, following in itertools.pairwise([*argv[1:], ""]):
        # The flags library answers an unknown key with an AttributeError from deep inside, and a
        # missing file at the first override.
        if key := re.match(r"--?config\.([^=]+)", arg):
            config_lib.check_key(key[1])
        if given := re.match(r"--?config(=|$)(.*)", arg):
            file = (given[2] if given[1] else following).partition(":")[0]
            if not file:
                raise UserError(_NAME_A_RECIPE)
            if not (os.path.isfile(file) and os.access(file, os.R_OK)):
                raise UserError(f"there is no recipe file {file} to read: try configs/larger.py")
    try:
        recipe = config_flags.DEFINE_config_file("config", flag_values=values)
        rest = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        if found := re.match(r"flag --config\.([^=]+)=(.*?): ", str(error)):
            raise config_lib.wrong_type(found[1], found[2]) from None
        # What the recipe raised is behind two errors that hold its traceback as a text.
        behind = error.__context__ and error.__context__.__context__
        raise _unusable(behind or error) from error
    except flags.Error as error:
        # Without a recipe there is no key to override.
        if getattr(error, "flagname", "").startswith("config."):
            raise UserError(_NAME_A_RECIPE) from None
        raise UserError(f"{error}; see python -m mnist_flax.main --help") from None
    except Exception as error:
        raise _unusable(error) from error
    if rest:
        raise UserError(f"{rest[0]!r} is no flag; see python -m mnist_flax.main --help")
    if not values["config"].present:
        raise UserError(_NAME_A_RECIPE)
    if not isinstance(recipe.value, ConfigDict):
        try:
            # An OSError in the recipe is kept until something of its configuration is asked for.
            getattr(recipe.value, "keys", None)
        except OSError as error:
            raise _unusable(error) from error
        raise UserError(
            f"the recipe file gives {recipe.value!r} instead of a ConfigDict: have its get_config "
            "return what mnist_flax.config.recipe gives"
        )
    if workdir.value == "":
        raise UserError("--workdir is empty: name a folder, or leave the flag out")
    return recipe.value, workdir.value


def _unusable(error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        error = error.__cause__ or error
    return UserError(f"the recipe file cannot be used ({error!r}): see configs/larger.py for one")


if __name__ == "__main__":
    cli.run(main)
