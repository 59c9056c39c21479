"""Every partitions definition. Keys are added by the sensors, and only keys that match their pattern are."""

from __future__ import annotations

import dagster as dg

from spatial_core.lake.catalogue import DROP_KEY, TAR_KEY

tars = dg.DynamicPartitionsDefinition(name="tar")
"""One raw tar; the key is its four-digit number."""

drops = dg.DynamicPartitionsDefinition(name="drop")
"""One dropped parquet of new images; the key is its file name without `.parquet`."""

KEY_PATTERNS = {"tar": TAR_KEY, "drop": DROP_KEY}

MANY_KEYS = dg.BackfillPolicy.multi_run(max_partitions_per_run=10)
"""A run costs a few seconds whatever it does, so neighbouring keys share one; but a step of a run shows its keys only
when it ends, and one run holds one place in the queue, so not too many. Every partitioned asset has the same policy:
assets that differ in it cannot share a run."""
