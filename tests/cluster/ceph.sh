#!/bin/bash
# A real one-node Ceph with an S3 gateway (RGW) on http://127.0.0.1:7480, kept in memory, for tests.
#   tests/cluster/ceph.sh up | down | status
# Everything it writes lies in HPC_MM_CLUSTER_DIR/ceph (default /var/tmp/hpc_mm-cluster/ceph); the address and the keys of
# its user `test` stand in s3.env there, readable by its owner only. Debian, root. A gateway that runs already is left alone.
set -eu
cd "$(dirname "$0")"
source ./packages.sh
D=${HPC_MM_CLUSTER_DIR:-/var/tmp/hpc_mm-cluster}/ceph
ENDPOINT=http://127.0.0.1:7480
export CEPH_CONF=$D/ceph.conf

answers() { curl -sf --max-time 10 $ENDPOINT >/dev/null 2>&1; }

write_config() {
  cat >"$CEPH_CONF" <<C
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon initial members = a
mon host = [v2:127.0.0.1:13300,v1:127.0.0.1:16789]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
public addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon max pg per osd = 1000
mon data avail crit = 1
keyring = $D/keyring
log file = $D/log/\$name.log
admin socket = $D/out/\$name.asok
pid file = $D/out/\$name.pid
run dir = $D/out
[mon]
mon data = $D/mon/ceph-\$id
[osd]
osd data = $D/osd/ceph-\$id
osd objectstore = memstore
memstore device bytes = 4294967296
osd max object name len = 2048
[mgr]
mgr data = $D/mgr/ceph-\$id
mgr initial modules =
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:7480
rgw data = $D/rgw
keyring = $D/keyring
rgw enable usage log = false
C
}

key() { ceph-authtool "$D/keyring" --gen-key "$@" >/dev/null; }

start_monitor() {
  ceph-authtool --create-keyring "$D/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  chmod 600 "$D/keyring"
  key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  key -n client.rgw.a --cap mon 'allow *' --cap osd 'allow *'
  local fsid
  fsid=$(sed -n 's/^fsid = //p' "$CEPH_CONF")
  monmaptool --create --fsid "$fsid" --addv a '[v2:127.0.0.1:13300,v1:127.0.0.1:16789]' "$D/monmap" >/dev/null
  ceph-mon --mkfs -i a --monmap "$D/monmap" --keyring "$D/keyring"
  ceph-mon -i a
}

start_storage() {
  local id
  key -n mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *'
  ceph auth import -i "$D/keyring" 2>/dev/null
  mkdir -p "$D/mgr/ceph-x"
  ceph-mgr -i x
  local uuid
  uuid=$(cat /proc/sys/kernel/random/uuid)
  id=$(ceph osd new "$uuid")
  mkdir -p "$D/osd/ceph-$id"
  key -n "osd.$id" --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
  ceph auth import -i "$D/keyring" 2>/dev/null
  ceph-osd -i "$id" --mkfs --osd-uuid "$uuid" >"$D/log/mkfs.log" 2>&1
  ceph-osd -i "$id" >>"$D/log/osd.out" 2>&1
  for _ in $(seq 60); do ceph -s 2>/dev/null | grep -q '1 up' && break; sleep 0.5; done
}

start_gateway() {
  radosgw -n client.rgw.a
  for _ in $(seq 120); do answers && break; sleep 0.5; done
  answers || { echo "Ceph did not come up: see $D/log" >&2; exit 1; }
  local secret
  secret=$(tr -d - </proc/sys/kernel/random/uuid)
  # The secret reaches radosgw-admin and s3.env only; nothing prints it.
  radosgw-admin user create --uid=test --display-name=test --access-key=test --secret-key="$secret" >/dev/null 2>&1
  (umask 077; printf 'AWS_ENDPOINT_URL=%s\nAWS_ACCESS_KEY_ID=test\nAWS_SECRET_ACCESS_KEY=%s\nAWS_DEFAULT_REGION=us-east-1\n' \
    $ENDPOINT "$secret" >"$D/s3.env")
}

up() {
  command -v curl >/dev/null || need curl
  if answers; then echo "an S3 gateway answers at $ENDPOINT already; left as it is"; return; fi
  [ "$(id -u)" = 0 ] || { echo "starting Ceph needs root" >&2; exit 1; }
  need ceph-mon ceph-osd ceph-mgr radosgw ceph-common curl
  down >/dev/null
  rm -rf "$D"
  mkdir -p "$D"/{mon,osd,mgr,rgw,log,out}
  write_config
  start_monitor
  start_storage
  start_gateway
  echo "Ceph is up: S3 at $ENDPOINT, credentials in $D/s3.env, logs in $D/log"
}

down() {
  [ -d "$D" ] || return 0
  stop_all "$D" radosgw ceph-osd ceph-mgr ceph-mon
  rm -f "$D/s3.env"
  echo "Ceph is down; its logs stay in $D/log"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) answers && echo "S3 at $ENDPOINT" || { echo "Ceph does not run"; exit 1; } ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
