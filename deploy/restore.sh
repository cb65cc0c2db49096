#!/bin/sh
# Put a backup of backup.sh in the place of compose.yaml's store: deploy/restore.sh FILE
# It is read into a database of its own first: a backup that breaks off leaves the store as it was.
set -eu
file=${1:?name the backup}
[ -f "$file" ] || { echo "there is no backup $file" >&2; exit 2; }
compose() { docker compose -f "$(dirname "$0")/compose.yaml" "$@"; }
in_postgres() { compose exec -T postgres "$@"; }

in_postgres dropdb --username=moepager --if-exists moepager_restored < /dev/null
in_postgres createdb --username=moepager moepager_restored < /dev/null
in_postgres pg_restore --username=moepager --no-owner --exit-on-error --single-transaction --dbname=moepager_restored < "$file"
compose --profile redis stop moepager worker
in_postgres dropdb --username=moepager --if-exists --force moepager < /dev/null
in_postgres psql --username=moepager --dbname=postgres --quiet --command='ALTER DATABASE moepager_restored RENAME TO moepager' < /dev/null
compose start moepager
echo "restored; with Redis, start the worker again, too: docker compose --profile redis start worker"
