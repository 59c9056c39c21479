"""Every partitions definition. Keys are added by the sensors, and only keys that match their pattern are."""

from __future__ import annotations

import dagster as dg

from spatial_core.lake.catalogue import DROP_KEY, TAR_KEY

tars = dg.DynamicPartitionsDefinition(name="tar")
"""One raw tar; the key is its four-digit number."""

drops = dg.DynamicPartitionsDefinition(name="drop")
"""One dropped parquet of new images; the key is its file name without `.parquet`."""

KEY_PATTERNS = {"tar": TAR_KEY, "drop": DROP_KEY}

RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
"""Tags by which a run is given neighbouring keys instead of one."""

MANY_KEYS = dg.BackfillPolicy.multi_run(max_partitions_per_run=50)
"""A run costs a few seconds whatever it does, and on a cluster it is one job array, so neighbouring keys share one; but
a step of a run shows its keys only when it ends, so not too many: the tars of the real data set are two runs. Every
partitioned asset has the same policy: assets that differ in it cannot share a run."""
