//! What must outlive this process: that the guest has left.
//!
//! It is forced to the disk while the guest stands still, so all that can be done before is done before: the file is there, of
//! its final size and known to its folder, when the migration begins, and then only its content changes.

use crate::plain_file;
use crate::rpc::MigrationFacts;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::Path;

const NAME: &str = "migration-completed.json";
/// Blanks as long as nothing is written.
const SIZE: usize = 4096;

/// A record that is prepared and not written yet.
#[derive(Debug)]
pub struct Record {
    file: File,
}

impl Record {
    /// Prepares the record in this folder, and forces that to the disk.
    pub fn prepare(folder: &Path) -> Result<Record> {
        std::fs::create_dir_all(folder)?;
        let file = File::options().create(true).truncate(false).write(true).open(folder.join(NAME))?;
        file.write_all_at(&[b' '; SIZE], 0)?;
        file.set_len(SIZE as u64)?;
        file.sync_all()?;
        // The name is on the disk only when the folder is.
        File::open(folder)?.sync_all()?;
        Ok(Record { file })
    }

    /// Writes down that the guest has left with this migration, and returns when the disk has it.
    pub fn write(&mut self, facts: &MigrationFacts) -> Result<()> {
        let mut bytes = serde_json::to_vec(facts)?;
        if bytes.len() > SIZE {
            // Only a reason of QEMU's can be long, and a guest that has left needs none.
            bytes = serde_json::to_vec(&MigrationFacts { error: None, ..facts.clone() })?;
        }
        if bytes.len() > SIZE {
            return Err(Error::new(ErrorKind::InvalidInput, "the facts are longer than the record"));
        }
        // The whole record in one write: nothing of an earlier, longer one is left behind.
        bytes.resize(SIZE, b' ');
        self.file.write_all_at(&bytes, 0)?;
        self.file.sync_data()
    }
}

/// The migration with which the guest has left, if it has. A record that is there but cannot be read is an error: it may say so.
pub fn read_departed(folder: &Path) -> Result<Option<MigrationFacts>> {
    match plain_file::read(&folder.join(NAME)) {
        Ok(bytes) if bytes.iter().all(u8::is_ascii_whitespace) => Ok(None),
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::MigrationRole;

    #[test]
    fn what_was_written_is_read_and_what_was_only_prepared_is_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_departed(folder.path()).unwrap(), None);
        let mut record = Record::prepare(folder.path()).unwrap();
        assert_eq!(read_departed(folder.path()).unwrap(), None);
        let facts = MigrationFacts { stop_us: Some(5), ..MigrationFacts::new("u", MigrationRole::Source) };
        record.write(&facts).unwrap();
        assert_eq!(read_departed(folder.path()).unwrap(), Some(facts));
    }

    #[test]
    fn a_record_is_written_over_by_a_shorter_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::prepare(folder.path()).unwrap();
        let facts = MigrationFacts::new("u", MigrationRole::Source);
        record.write(&MigrationFacts { error: Some("x".repeat(1000)), ..facts.clone() }).unwrap();
        record.write(&facts).unwrap();
        assert_eq!(read_departed(folder.path()).unwrap(), Some(facts));
    }

    #[test]
    fn a_broken_record_is_an_error_and_a_long_one_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::prepare(folder.path()).unwrap();
        let long = MigrationFacts { error: Some("x".repeat(9000)), ..MigrationFacts::new("u", MigrationRole::Source) };
        record.write(&long).unwrap();
        assert_eq!(read_departed(folder.path()).unwrap().unwrap().error, None);
        std::fs::write(folder.path().join(NAME), b"{").unwrap();
        assert!(read_departed(folder.path()).is_err());
    }
}
