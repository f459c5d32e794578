"""Neuronpedia's own importer on what `ksparse convert --to neuronpedia` wrote, in a real Postgres.

    python clients_neuronpedia.py CHECKOUT URL EXPORT NODE          import, and print {table: rows} as JSON
    python clients_neuronpedia.py CHECKOUT URL --facts FILE         write the facts of the tables that tests/interop checks against

CHECKOUT: a clone of hijohnnylin/neuronpedia. URL: of a Postgres server, in which the database `ksparse_judge` is made anew. EXPORT: the folder of one source,
MODEL/LAYER-SET; or one of SAEDashboard's batch-K.json, which their convert-saedashboard-to-neuronpedia-export.py makes it of (typer, orjson, python-dotenv). NODE: a folder with node_modules/pg and node_modules/typescript (npm install --ignore-scripts pg typescript).

The tables are made by their migrations (without pgvector its columns are text; nothing is imported into them). Features, activations and explanations are
written by their importJsonlString (lib/db/import.ts). Their importer makes the other rows with Prisma, whose engines are not on the package index, so the same
rules are applied here: every key is a field of schema.prisma, every field without a default or `?` is there; then the row is inserted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extras import Json

DATABASE = "ksparse_judge"
CREATED = {
    "release": "SourceRelease",
    "model": "Model",
    "sourceset": "SourceSet",
    "source": "Source",
}
IMPORTED = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
SCORED = ("ExplanationScoreModel", "ExplanationScore")
SEEDED_USER = "clkht01d40000jv08hvalcvly"
IMPORTER = """
const fs = require('fs'), zlib = require('zlib'), ts = require('typescript');
const [, , file, table, ...paths] = process.argv;
const code = ts.transpileModule(fs.readFileSync(file, 'utf8'), {compilerOptions: {module: 'commonjs', target: 'es2022'}}).outputText;
const module_ = {exports: {}};
new Function('require', 'module', 'exports', code)((name) => (name.startsWith('@/') ? {} : require(name)), module_, module_.exports);
(async () => {
  for (const path of paths) await module_.exports.importJsonlString(table, zlib.gunzipSync(fs.readFileSync(path)).toString());
  process.exit(0);
})().catch((error) => { console.error(error.message); process.exit(1); });
"""


def main() -> None:
    checkout, url, *rest = sys.argv[1:]
    webapp = Path(checkout) / "apps" / "webapp"
    connection = new_database(url, webapp)
    if rest[0] == "--facts":
        lines = [f'"{key}": {json.dumps(value)}' for key, value in facts(connection).items()]
        Path(rest[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    with tempfile.TemporaryDirectory() as work:
        export = converted(Path(checkout), Path(rest[0]), Path(work))
        address, node = f"{url}/{DATABASE}", Path(rest[1])
        print(json.dumps(imported(connection, address, webapp, export, node)))


def converted(checkout: Path, export: Path, work: Path) -> Path:
    """Return the folder of a source; made by their converter if it is SAEDashboard's."""
    if not (export / "batch-0.json").exists():
        return export
    utils = checkout.resolve() / "utils" / "neuronpedia-utils"
    options = {
        "saedashboard-output-dir": export.resolve(),
        "creator-name": "me",
        "release-id": "test",
        "release-title": "test",
        "url": "https://example.org",
        "model-name": "tiny",
        "neuronpedia-source-set-id": "test",
        "neuronpedia-source-set-description": "test",
        "hf-weights-repo-id": "nobody/nothing",
        "hf-weights-path": "a/b",
        "hook-point": "hook_resid_post",
        "layer-num": json.loads((export / "batch-0.json").read_text())["layer"],
        "prompts-huggingface-dataset-path": "nobody/nothing",
        "n-prompts-total": 1,
        "n-tokens-in-prompt": 1,
    }
    script = utils / "neuronpedia_utils" / "convert-saedashboard-to-neuronpedia-export.py"
    done = subprocess.run(
        [
            sys.executable,
            script,
            *(f"--{key}={value}" for key, value in options.items()),
            "--zero-out-bos-token",
        ],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(utils), "DEFAULT_CREATOR_ID": SEEDED_USER},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{script.name}: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    return next((work / "exports" / "tiny").iterdir())


def imported(
    connection: Any, address: str, webapp: Path, export: Path, node: Path
) -> dict[str, int]:
    """Import a folder; return {table: rows}."""
    schema = (webapp / "prisma" / "schema.prisma").read_text()
    for name, table in CREATED.items():
        for line in (export / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if not row.get("inferenceHosts"):  # their route leaves an empty list out
                row.pop("inferenceHosts", None)
            create(connection, schema, table, row)
    (node / "importer.js").write_text(IMPORTER)
    for name, table in IMPORTED.items():
        paths = sorted((export / name).glob("*.jsonl.gz"))
        if not paths:
            continue
        done = subprocess.run(
            [
                "node",
                "importer.js",
                webapp.resolve() / "lib" / "db" / "import.ts",
                table,
                *(path.resolve() for path in paths),
            ],
            cwd=node,
            env={"POSTGRES_URL_NON_POOLING": address, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{table}: {done.stderr[-2000:]}")
    with connection.cursor() as cursor:
        counts = {}
        for table in [*CREATED.values(), *IMPORTED.values()]:
            cursor.execute(f'SELECT count(*) FROM "{table}"')
            counts[table] = cursor.fetchone()[0]
    return counts


def new_database(url: str, webapp: Path) -> Any:
    """Return a connection to a new database with their tables and the user of their seed."""
    server = psycopg2.connect(f"{url}/postgres")
    server.autocommit = True
    with server.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        cursor.execute(f"CREATE DATABASE {DATABASE}")
    server.close()
    connection = psycopg2.connect(f"{url}/{DATABASE}")
    connection.autocommit = True
    with connection.cursor() as cursor:
        for folder in sorted((webapp / "prisma" / "migrations").iterdir()):
            if not folder.is_dir():
                continue
            sql = re.sub(r"\bvector\(\d+\)", "text", (folder / "migration.sql").read_text())
            sql = "\n".join(
                line
                for line in sql.splitlines()
                if not re.search(r"EXTENSION.*vector|USING hnsw", line, re.I)
            )
            if re.sub(r"--.*", "", sql).strip():
                cursor.execute(sql)
        cursor.execute(
            'INSERT INTO "User" (id, name, "emailUnsubscribeCode") VALUES (%s, %s, %s)',
            (SEEDED_USER, "bot", "code"),
        )
    return connection


def create(connection: Any, schema: str, table: str, row: dict[str, Any]) -> None:
    """Make a row as Prisma's `create` does."""
    fields = dict(
        re.findall(
            r"^  (\w+)\s+(\w+[\[\]?]*.*)$",
            re.search(rf"^model {table} \{{(.*?)^\}}", schema, re.S | re.M)[1],
            re.M,
        )
    )
    models = set(re.findall(r"^model (\w+)", schema, re.M))
    columns = {
        name: kind for name, kind in fields.items() if re.match(r"\w+", kind)[0] not in models
    }
    if unknown := set(row) - set(columns):
        sys.exit(f"{table}: unknown argument {', '.join(sorted(unknown))}")
    missing = [
        name
        for name, kind in columns.items()
        if name not in row
        and not re.match(r"\w+(\?|\[\])", kind)
        and "@default" not in kind
        and "@updatedAt" not in kind
    ]
    if missing:
        sys.exit(f"{table}: argument {', '.join(missing)} is missing")
    names = ", ".join(f'"{name}"' for name in row)
    values = [Json(value) if isinstance(value, dict) else value for value in row.values()]
    with connection.cursor() as cursor:
        cursor.execute(
            f'INSERT INTO "{table}" ({names}) VALUES ({", ".join(["%s"] * len(row))})', values
        )


def facts(connection: Any) -> dict[str, Any]:
    """Return {table: {columns: {name: [type, required]}, references: {columns: [table, columns]}}}."""
    found: dict[str, Any] = {}
    with connection.cursor() as cursor:
        for table in [*CREATED.values(), *IMPORTED.values(), *SCORED]:
            cursor.execute(
                "SELECT column_name, CASE data_type WHEN 'ARRAY' THEN ltrim(udt_name, '_') || '[]' WHEN 'USER-DEFINED' THEN udt_name ELSE data_type END, "
                "is_nullable = 'NO' AND column_default IS NULL, is_nullable = 'NO' FROM information_schema.columns WHERE table_name = %s AND table_schema = 'public' ORDER BY 1",
                (table,),
            )
            columns = {
                name: [kind, *["required"] * required, *["not null"] * strict]
                for name, kind, required, strict in cursor
            }
            cursor.execute(
                "SELECT (SELECT string_agg(a.attname, ' ' ORDER BY u.i) FROM unnest(c.conkey) WITH ORDINALITY u(k, i) JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = u.k), "
                "t.relname, (SELECT string_agg(a.attname, ' ' ORDER BY u.i) FROM unnest(c.confkey) WITH ORDINALITY u(k, i) JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = u.k) "
                "FROM pg_constraint c JOIN pg_class t ON t.oid = c.confrelid WHERE c.contype = 'f' AND c.conrelid = %s::regclass ORDER BY 1",
                (f'"{table}"',),
            )
            found[table] = {
                "columns": columns,
                "references": {key: [other, columns] for key, other, columns in cursor},
            }
        cursor.execute(
            "SELECT e.enumlabel FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid WHERE t.typname = 'Visibility' ORDER BY e.enumsortorder"
        )
        found["Visibility"] = [label for (label,) in cursor]
    return found


if __name__ == "__main__":
    main()
