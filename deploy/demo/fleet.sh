# The fleet's chapter of deploy/demo.sh, which sources this: brokers, enrolment, jobs. Uses $bin, $folder, $mosquitto.
# shellcheck shell=bash disable=SC2154

export EDGE_FLEET_DIR="$folder/fleet"
read -r devices operators claims < <("$bin/python" - <<'END'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in sockets))
END
)

fleet() { "$bin/edge-fleet" "$@"; }

fleet init --tenant acme --broker "localhost:$devices" --operators "localhost:$operators" --claims "localhost:$claims" \
    --server-cert localhost --no-password 2>/dev/null
mkdir "$folder/broker" "$folder/broker/data" "$folder/broker/claims"
cp "$EDGE_FLEET_DIR"/broker/* "$folder/broker/"
deploy/mosquitto/render.sh acme "$folder/broker" "PORT=$devices" "OPERATOR_PORT=$operators" "CLAIM_PORT=$claims" \
    "DATA=$folder/broker/data" "CLAIM_DATA=$folder/broker/claims" >/dev/null
for name in broker claims; do
    # As root it would become a user of its own, who may not read what is ours.
    [ "$(id -u)" -ne 0 ] || echo "user root" >>"$folder/broker/$name.conf"
    "$mosquitto" -c "$folder/broker/$name.conf" 2>"$folder/broker/$name.log" &
    others+=("$!")
    sleep 0.3
done

# What goes into an image: no name of a device, no secret but the credential with which it may ask to join.
cp -r "$EDGE_FLEET_DIR/image/link" "$EDGE_FLEET_DIR/image/trust.toml" "$folder/etc/"
sed "s#/etc/edge-agent#$folder/etc#" "$EDGE_FLEET_DIR/image/config.toml" >"$EDGE_AGENT_CONFIG"
echo "splay_s = 0.0" >>"$EDGE_AGENT_CONFIG"
kill -HUP "$core"
"$bin/edge-agent" link 2>"$folder/link.log" &
others+=("$!")

keyid=""
for _ in $(seq 100); do
    keyid="$(fleet approve --json | "$bin/python" -c \
        'import json, sys; print(next((row["keyid"] for row in json.load(sys.stdin)["announced"]), ""))')"
    [ -z "$keyid" ] || break
    sleep 0.2
done
[ -n "$keyid" ] || die "the device did not announce itself"
fleet approve door-7 --keyid "$keyid" --yes --wait 30s
echo
fleet devices list
echo
fleet rpc ping --device door-7
fleet fit "$folder/digits.edgemodel"
echo
echo "a job that changes its configuration, and would be taken back if the link did not return:"
fleet job config.apply --args '{"config": {"telemetry": {"status_s": 5.0}}}' --device door-7 --wait
echo
echo "a job that verifies every encrypted file:"
fleet job store.scrub --device door-7 --wait
echo
echo "an order that takes something away for good needs two people:"
fleet job model.remove model=digits --device door-7 || true
"$bin/edge-agent" jobs list
