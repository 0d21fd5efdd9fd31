import hashlib, os, signal, time
from pathlib import Path
import pytest
from distributed import Client, LocalCluster
from reference import Reference
from s3 import S3, s3_server
from tartapefs import TapeRecorder
from tartapefs.distributed import upload

PART = 5 << 20

def test_smoke(tmp_path):
    root = tmp_path/"data"; root.mkdir()
    for i in range(30): (root/f"{i}").write_bytes(os.urandom(1_500_000))
    TapeRecorder(root).commit()
    ref = Reference(root)
    t=time.time()
    with s3_server() as s3:
        print("server", time.time()-t); t=time.time()
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path/"dask")) as cluster, Client(cluster) as client:
            print("cluster", time.time()-t); t=time.time()
            print(upload(root, "s3://tapes/a.tar", client, part_size=PART, storage_options=s3.options))
            print("upload", time.time()-t, s3.received, s3.etag("a.tar")); t=time.time()
            assert s3.object("a.tar") == ref.read(0, ref.size)
            print(upload(root, f"file://{tmp_path}/out/", client, part_size=PART))
            print("upload", time.time()-t, os.listdir(tmp_path/"out"))
        print("down", time.time()-t)
