BEGIN TRANSACTION;
CREATE TABLE counters (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        epoch INTEGER NOT NULL DEFAULT 0,
        generation INTEGER NOT NULL DEFAULT 0,
        document TEXT NOT NULL DEFAULT '',
        seq INTEGER NOT NULL DEFAULT 0,
        desired_version INTEGER NOT NULL DEFAULT 0,
        desired BLOB NOT NULL DEFAULT x''
    );
INSERT INTO "counters" VALUES(1,2,9,'x',8,4,X'7468652064657369726564207374617465');
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "facts" VALUES('clock-floor','2026-03-01T00:00:00+00:00');
CREATE TABLE jobs (
        key INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL,
        job_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        op TEXT NOT NULL,
        kind TEXT NOT NULL,
        lane TEXT NOT NULL CHECK (lane IN ('normal', 'rescue')),
        priority INTEGER NOT NULL,
        args TEXT NOT NULL,
        not_after TEXT,
        step_timeout_s REAL NOT NULL,
        total_timeout_s REAL NOT NULL,
        cron TEXT,
        window_s INTEGER,
        tz TEXT,
        envelope BLOB NOT NULL,
        digest TEXT NOT NULL,
        accepted_at TEXT NOT NULL,
        cancel INTEGER NOT NULL DEFAULT 0,
        published INTEGER NOT NULL DEFAULT 0,
        at TEXT NOT NULL,
        clock_trusted INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (
            state IN ('queued', 'running', 'succeeded', 'failed', 'rejected', 'cancelled')
        ),
        phase TEXT,
        step TEXT,
        rev INTEGER NOT NULL,
        attempt INTEGER NOT NULL DEFAULT 0,
        elapsed_s REAL NOT NULL DEFAULT 0,
        begun TEXT NOT NULL DEFAULT '[]',
        done INTEGER NOT NULL DEFAULT 0,
        ending TEXT,
        notes TEXT NOT NULL DEFAULT '{}',
        result TEXT,
        error TEXT,
        UNIQUE (epoch, job_id)
    );
INSERT INTO "jobs" VALUES(1,2,'interrupted',3,'program','change','normal',5,'{}',NULL,600.0,6000.0,NULL,NULL,NULL,X'656E76656C6F70652033','9481d475106f17adb59c4a1cdbcf7fdfa3337bf89b163b33f3058ddd633b3889','2026-03-01T00:00:00Z',0,2,'2026-03-01T00:00:00Z',1,'running','installing','b',3,2,12.5,'["a","b"]',1,NULL,'{}',NULL,NULL);
INSERT INTO "jobs" VALUES(2,2,'going-back',4,'program','change','rescue',5,'{}',NULL,600.0,6000.0,NULL,NULL,NULL,X'656E76656C6F70652034','550858b75690e7d136d52698f37306c66766b9a954b9ac3ac42824d7d16d30b8','2026-03-01T00:00:00Z',0,0,'2026-03-01T00:00:00Z',1,'running','trying','b',4,1,0.0,'["a","b"]',1,'{"state": "failed", "failure": {"code": "failed", "text": "cannot do b: no", "hint": ""}, "undone": 0, "troubles": []}','{"before":"1.0.0"}',NULL,'{"code":"failed","text":"cannot do b: no","hint":""}');
INSERT INTO "jobs" VALUES(3,2,'succeeded',5,'program','change','normal',5,'{}',NULL,600.0,6000.0,NULL,NULL,NULL,X'','227866ff4492453540c944b71d2eeddc747354dfc565fc6394e5e77a7314fd35','2026-03-01T00:00:00Z',0,3,'2026-03-01T00:00:00Z',1,'succeeded',NULL,NULL,3,1,0.0,'[]',0,NULL,'{}','{"freed_bytes":4096}',NULL);
INSERT INTO "jobs" VALUES(4,2,'queued',6,'program','change','normal',9,'{"model":"digits","nested":[1,2.5,null,true,"\u00fc"]}',NULL,600.0,6000.0,NULL,NULL,NULL,X'656E76656C6F70652036','90c6443fa9c2907b2dd2eb49ab6ff34a1ee9dba3099f49bba0931525b3aad8f9','2026-03-01T00:00:00Z',0,0,'2026-03-01T00:00:00Z',1,'queued',NULL,NULL,1,0,0.0,'[]',0,NULL,'{}',NULL,NULL);
INSERT INTO "jobs" VALUES(5,2,'waiting',7,'program','change','normal',5,'{}',NULL,600.0,6000.0,'0 22 * * *',3600,'Europe/Berlin',X'656E76656C6F70652037','11b50b82b86274958fe6f1aa4e942d4dd2a37b57c91375f3542b048bb7b378c7','2026-03-01T00:00:00Z',0,1,'2026-03-01T00:00:00Z',1,'running','waiting_window',NULL,2,0,0.0,'[]',0,NULL,'{}',NULL,NULL);
INSERT INTO "jobs" VALUES(6,2,'rejected',8,'program','change','normal',5,'{}',NULL,600.0,6000.0,NULL,NULL,NULL,X'','6da69e5c4d9e1d064f4c622bb7ff9b0eebd17d002f18900982db3253c4f4cd73','2026-03-01T00:00:00Z',0,0,'2026-03-01T00:00:00Z',1,'rejected',NULL,NULL,1,0,0.0,'[]',0,NULL,'{}',NULL,'{"code":"bad_args","text":"cannot take arguments: model","hint":"name it"}');
CREATE TABLE maintenance (
        task TEXT PRIMARY KEY,
        started_at TEXT,
        ended_at TEXT,
        ok INTEGER,
        text TEXT NOT NULL DEFAULT '',
        data TEXT NOT NULL DEFAULT '{}'
    );
INSERT INTO "maintenance" VALUES('scrub','2026-03-01T00:00:00Z','2026-03-01T00:01:00Z',1,'','{"blobs": 3}');
CREATE TABLE refusals (code TEXT PRIMARY KEY, count INTEGER NOT NULL);
INSERT INTO "refusals" VALUES('bad_signature',7);
INSERT INTO "refusals" VALUES('expired',1);
COMMIT;
