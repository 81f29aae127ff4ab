//! What must outlive this process: that the guest has left.

use crate::rpc::MigrationFacts;
use std::io::Write;
use std::path::{Path, PathBuf};

const DEPARTED: &str = "migration-completed.json";

fn path(folder: &Path) -> PathBuf {
    folder.join(DEPARTED)
}

/// Writes down that the guest has left with this migration, and returns when the disk has it.
pub fn write_departed(folder: &Path, facts: &MigrationFacts) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let draft = folder.join(format!("{DEPARTED}.new"));
    let mut file = std::fs::File::create(&draft)?;
    file.write_all(&serde_json::to_vec(facts)?)?;
    file.sync_all()?;
    std::fs::rename(&draft, path(folder))?;
    // The name is on the disk only when the folder is.
    std::fs::File::open(folder)?.sync_all()
}

/// The migration with which the guest has left, if it has.
pub fn read_departed(folder: &Path) -> std::io::Result<Option<MigrationFacts>> {
    match std::fs::read(path(folder)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::MigrationRole;

    #[test]
    fn what_was_written_is_read_and_a_broken_record_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_departed(folder.path()).unwrap(), None);
        let facts = MigrationFacts { stop_us: Some(5), ..MigrationFacts::new("u", MigrationRole::Source) };
        write_departed(folder.path(), &facts).unwrap();
        assert_eq!(read_departed(folder.path()).unwrap(), Some(facts));
        std::fs::write(path(folder.path()), b"{").unwrap();
        assert!(read_departed(folder.path()).is_err());
    }
}
