"""All faults, by the name that `torture.py --rows` takes."""

from faults.damage import compilation_cache, flip, truncate
from faults.dataset import dataset
from faults.disk import full_disk
from faults.fault import Fault
from faults.hostile import FILES, hostile
from faults.images import (
    bad_folder,
    bad_image,
    bad_record,
    killed_decoder,
    lost_image,
    odd_image,
)
from faults.kills import kill, stop, two_runs
from faults.long_run import long_run
from faults.numerics import devices, not_finite
from faults.store import bucket_damage, bucket_gone, bucket_kill, bucket_two_runs

TABLE = {
    "kill": Fault(
        "SIGKILL at a random moment, a third inside a save",
        "resumes from the newest checkpoint; all numbers equal the uninterrupted run's, to the bit",
        kill,
        100,
    ),
    "stop": Fault(
        "SIGTERM, SIGINT, SIGHUP, SIGUSR1 between steps, in an evaluation, in the compiler, before "
        "the data",
        "saves, exits with 128 + signal within 10 s, no step lost",
        stop,
        16,
        "s to stop",
    ),
    "full_disk": Fault(
        "disk full at varying offsets",
        "one-line error, exit code 2; the previous checkpoint loads and the run goes on",
        full_disk,
        20,
    ),
    "flip": Fault(
        "flipped bit in a checkpoint",
        "detected, falls back and says so, unless no number changed",
        flip,
        1000,
        "changed no number",
        sum,
    ),
    "truncate": Fault(
        "truncated checkpoint file",
        "detected, falls back and says so, unless no number changed",
        truncate,
        100,
        "changed no number",
        sum,
    ),
    "not_finite": Fault(
        "loss not finite",
        "stops within one log interval (4 steps), names the step; the last checkpoint is finite",
        not_finite,
        10,
        "steps late",
    ),
    "devices": Fault(
        "resumed on 1, 2, 4, 8, 1 devices",
        "same examples; equal within float64 rounding (1e-12)",
        devices,
        1,
        "relative difference",
    ),
    "two_runs": Fault(
        "two runs in one work directory",
        "the second is refused; a killed run's lock is no obstacle",
        two_runs,
        10,
    ),
    "bucket_kill": Fault(
        "SIGKILL in the middle of an upload to a bucket; half of the times the disk is lost, too",
        "goes on from the newest whole checkpoint; all numbers equal the uninterrupted run's, to "
        "the bit",
        bucket_kill,
        20,
    ),
    "bucket_gone": Fault(
        "the bucket's store unreachable for a minute, or for good",
        "training goes on; then everything goes up, or one-line error, exit code 2, and the same "
        "command uploads it",
        bucket_gone,
        4,
    ),
    "bucket_two_runs": Fault(
        "two runs on one bucket's URL",
        "the second is refused; a killed run's lease is no obstacle, on another machine after its "
        "time",
        bucket_two_runs,
        10,
    ),
    "bucket_damage": Fault(
        "object of a checkpoint lost or cut off in a bucket",
        "detected, falls back and says so; none whole: an error",
        bucket_damage,
        20,
    ),
    "dataset": Fault(
        "damaged dataset or cache; four first runs at once",
        "prepared again, once, never trained on",
        dataset,
        20,
    ),
    "bad_image": Fault(
        "image cut short, empty, no image, a bomb, a broken link, a pipe",
        "named with the reason before the first step; left out if that is allowed, and every other "
        "image has its own label",
        bad_image,
        20,
    ),
    "odd_image": Fault(
        "PNG called .jpg, CMYK, grey, 16 bits, transparent, turned, animated, a link elsewhere, a "
        "name that is no UTF-8",
        "read; every image has its own label",
        odd_image,
        20,
    ),
    "bad_folder": Fault(
        "class in one split only, or without images; no images", "named", bad_folder, 20
    ),
    "bad_record": Fault(
        "record or shard of TFDS damaged, cut short or lost",
        "named before the first step; a record is left out if that is allowed, and every other one "
        "has its own label",
        bad_record,
        20,
    ),
    "lost_image": Fault(
        "image that vanishes or is cut short while it is streamed",
        "the stream ends with its name",
        lost_image,
        20,
    ),
    "killed_decoder": Fault(
        "SIGKILL for a process that decodes images",
        "the stream ends with the reason within a minute",
        killed_decoder,
        20,
    ),
    "hostile": Fault(
        "hostile checkpoint or weights",
        "refused in one line, nothing executed, memory bounded",
        hostile,
        len(FILES),
        "MB of memory",
    ),
    "compilation_cache": Fault(
        "damaged compilation cache", "the same numbers", compilation_cache, 10
    ),
    "long_run": Fault(
        "2,000 steps",
        "memory flat within 1 % in the second half, nothing compiled after the first quarter",
        long_run,
        1,
        "% more memory",
    ),
}
