-- Workloads: the columns that are searched, and the whole record as JSON.
CREATE TABLE workloads (
    id       TEXT PRIMARY KEY,
    name     TEXT NOT NULL UNIQUE,
    status   TEXT NOT NULL,
    document TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Small documents of other areas: networks, endpoints, volumes.
CREATE TABLE documents (
    kind     TEXT NOT NULL,
    key      TEXT NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (kind, key)
) STRICT, WITHOUT ROWID;
