cp .gpu/pc/* /tmp/pd; python3 /tmp/pd/unpack.py /tmp/pd/site; export PYTHONPATH=/tmp/pd/site
timeout 170 python3 .gpu/nccl_paddle.py 2>&1 | tail -40 | cut -c1-200
