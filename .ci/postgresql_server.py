"""Serve the sample configuration from a PostgreSQL cluster of its own; both end with the process."""

import json
import signal
import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scim_server import running
from test_scim_server import Cluster

config = json.loads((ROOT / "sample_config.json").read_text("utf-8"))
del config["data_dir"], config["listen"]  # running() chooses a free port
with closing(Cluster()) as cluster:
    cluster.initialize()
    cluster.start()
    with running({**config, "database": cluster.url()}) as server:
        print(f"scim_server listening on {server.url}", flush=True)
        signal.pause()
