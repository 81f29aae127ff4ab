//! Tables and partial objects.

use crate::kinds::Kind;
use crate::server::Context;
use godwit_machinery::status::Status;
use godwit_machinery::table::{self, Include, Options};
use serde_json::Value;

pub(crate) use godwit_machinery::table::partial;

/// How a table is to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    version: &'static str,
    include: Include,
    /// Whether to describe the columns; watches do it once.
    pub(crate) headings: bool,
}

impl Table {
    pub(crate) fn parse(cx: &Context, version: &'static str) -> Result<Self, Status> {
        Ok(Self { version, include: Include::parse(cx.params.get("includeObject"))?, headings: true })
    }

    pub(crate) fn render(&self, kind: &Kind, objects: &[Value], metadata: Value) -> Value {
        let options = Options { include: self.include, version: self.version, headers: self.headings };
        let objects: Vec<&Value> = objects.iter().collect();
        let mut table = table::render(&kind.resource, &objects, options, jiff::Timestamp::now());
        if let Some(map) = table.as_object_mut() {
            map.insert("metadata".to_owned(), metadata);
        }
        table
    }
}
