#!/bin/sh
# Back up the store of compose.yaml while the service runs: deploy/backup.sh FILE
# (`moepager backup` does the same where moepager and PostgreSQL's clients are; the image has no such clients.)
set -eu
umask 077
file=${1:?name a new file for the backup}
[ ! -e "$file" ] || { echo "$file is there already, and no backup is overwritten: name a new file" >&2; exit 2; }
part=$file.part
trap 'rm -f "$part"' EXIT
compose() { docker compose -f "$(dirname "$0")/compose.yaml" "$@"; }

compose exec -T postgres pg_dump --username=moepager --format=custom --no-owner moepager > "$part"
mv "$part" "$file"
